"""Compares GaussianDiffusion with the tutorial's formulas in float64, within a bound for rounding errors."""

import functools

import pytest
import torch
from support.tutorial import Tutorial

from ddpm_ext import GaussianDiffusion

BACKENDS = ("fused", "reference")
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large")
SHAPE = (6, 3, 5, 7)
# The bound for an operator's error, relative to the sum of its terms' absolute values. The operator rounds
# coefficients, products and sums to float32. The largest measured error is 2.6 half-ulps, about half of this bound.
HALF_ULPS = 5 * 2.0**-24

backends = pytest.mark.parametrize("backend", BACKENDS)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)
variances = pytest.mark.parametrize("variance", VARIANCES)
clips = pytest.mark.parametrize("clip", [True, False])


def float64(v):
    """v in float64 on the CPU."""
    return v.double().cpu()


def timesteps(device):
    """A timestep for each sample of SHAPE."""
    return torch.tensor([0, 1, 17, 500, 998, 999], device=device)


def normals(count, device, shape=SHAPE, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).unbind(0)


def pair(prediction="eps", variance="fixed_small", backend="fused", schedule="linear"):
    gd = GaussianDiffusion(1000, schedule, prediction=prediction, variance=variance, backend=backend)
    return gd, Tutorial(gd.betas, prediction, variance)


def check(actual, expected, magnitude, device, dtype=torch.float32):
    """Checks `actual` against `expected`. magnitude: the sum of the absolute values of the terms that are rounded."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.device == device
    allowed = HALF_ULPS * magnitude
    if dtype != torch.float32:  # the result is also rounded to its dtype
        allowed = allowed + torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(dtype).smallest_normal
    error = (float64(actual) - expected).abs()
    assert (error <= allowed).all(), (error / allowed).max()


def check_variances(actual, expected, device):
    """Checks the variance and its logarithm: shape (batch, 1, 1, 1), and the expected values, rounded to float32."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == (SHAPE[0], 1, 1, 1)
        assert a.dtype == torch.float32
        assert a.device == device
        torch.testing.assert_close(a.cpu(), e.float(), rtol=2.0**-23, atol=0)


@functools.cache
def tutorial(prediction):
    """The Tutorial with the linear schedule of 1000 timesteps."""
    return pair(prediction)[1]


def target_of(prediction, x, z, t):
    """The training target of a prediction, for the schedule of `tutorial`, from its definition, in float64."""
    truth = tutorial(prediction)
    if prediction == "x_prev":
        return truth.q_posterior_mean_variance(x, truth.q_sample(x, t, z), t)[0]
    return truth.target(x, t, z)


def log_variance_of(gd, v, t):
    """The logarithm of the variance of p(x_{t-1} | x_t), as guided-diffusion computes it.

    v: the second half of the model's output, from which a learned variance follows. guided-diffusion does not have
        "learned_variance", for which v is the variance itself.
    """
    smallest = torch.cat([gd.posterior_variance[1:2], gd.posterior_variance[1:]]).log()
    small, large = (c[t.cpu()].reshape(-1, 1, 1, 1) for c in (smallest, gd.betas.log()))
    if gd.variance == "fixed_small":
        return small
    if gd.variance == "fixed_large":
        return torch.where(t.cpu().reshape(-1, 1, 1, 1) == 0, small, large)
    v = float64(v)
    if gd.variance == "learned_range":
        return (v + 1) / 2 * large + (1 - v) / 2 * small
    return v if gd.variance == "learned" else v.log()


def start_magnitude(truth, x, m, t):
    """The magnitude, for `check`, of the predicted x_0: the sum of the absolute values of its terms.

    For v it is |x| + |m|, which is not smaller, since the coefficients of x and m are at most 1.
    """
    if truth.prediction == "x0":
        return float64(m).abs()
    if truth.prediction == "v":
        return float64(x).abs() + float64(m).abs()
    return truth.predict_start_from_noise(x.abs(), t, -m.abs())


def step_magnitude(truth, x, m, t, z=None):
    """The magnitude, for `check`, of a reverse step with the noise z."""
    magnitude = truth.q_posterior_mean_variance(start_magnitude(truth, x, m, t), x.abs(), t)[0]
    return magnitude if z is None else magnitude + float64(z).abs()
