"""GaussianDiffusion against the tutorial's formulas in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.comparison import (
    SHAPE,
    backends,
    check,
    check_variances,
    clips,
    float64,
    normals,
    pair,
    predictions,
    step_magnitude,
    timesteps,
    variances,
)
from support.tutorial import ATTRIBUTES, Tutorial

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.tables.schedules import SCHEDULES


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"flow"}))
def test_attributes(name):
    gd = GaussianDiffusion(1000, name)
    truth = Tutorial(gd.betas)
    assert len(ATTRIBUTES) == 13 and gd.timesteps == 1000
    for attribute in ATTRIBUTES:
        value = getattr(gd, attribute)
        assert (value.dtype, value.shape, value.device.type) == (torch.float64, (1000,), "cpu")
        # measured 6.3e-13, factor 5
        torch.testing.assert_close(value, getattr(truth, attribute), rtol=3e-12, atol=0, msg=attribute)
    # 1 - alphas_cumprod would lose digits: log1p and expm1 do not.
    lost = -torch.expm1(torch.log1p(-gd.betas).cumsum(0))
    torch.testing.assert_close(gd.sqrt_one_minus_alphas_cumprod, lost.sqrt(), rtol=3e-12, atol=0)


def test_betas(device):
    betas = torch.linspace(0.01, 0.3, 20, device=device)
    gd = GaussianDiffusion(20, betas)
    assert torch.equal(gd.betas, float64(betas))
    betas.fill_(0.5)
    assert gd.betas[0] < 0.011
    assert GaussianDiffusion().betas[[0, -1]].tolist() == [1e-4, 0.02] and len(GaussianDiffusion().betas) == 1000


# ---------------------------------------------------------------------------------------------------- methods


@backends
def test_forward_process(backend, device):
    gd, truth = pair(backend=backend)
    x, z = normals(2, device)
    t = timesteps(device)
    x_t = gd.q_sample(x, t, z)
    check(x_t, truth.q_sample(x, t, z), truth.q_sample(x.abs(), t, z.abs()), device)
    expected, magnitude = truth.predict_start_from_noise(x, t, z), truth.predict_start_from_noise(x.abs(), t, -z.abs())
    check(gd.predict_start_from_noise(x, t, z), expected, magnitude, device)
    magnitude = truth.predict_start_from_noise(x_t.abs(), t, -z.abs())
    check(gd.predict_start_from_noise(x_t, t, z), x.double().cpu(), 2 * magnitude, device)  # the inverse of q_sample
    mean, *rest = gd.q_mean_variance(x, t)
    expected, *expected_rest = truth.q_mean_variance(x, t)
    check(mean, expected, expected.abs(), device)
    check_variances(rest, expected_rest, device)
    mean, *rest = gd.q_posterior_mean_variance(x, z, t)
    expected, *expected_rest = truth.q_posterior_mean_variance(x, z, t)
    check(mean, expected, truth.q_posterior_mean_variance(x.abs(), z.abs(), t)[0], device)
    check_variances(rest, expected_rest, device)
    assert rest[1][0].item() == pytest.approx(np.log(1e-20))


@backends
@variances
@predictions
@clips
def test_reverse_process(backend, prediction, variance, clip, device):
    gd, truth = pair(prediction, variance, backend)
    x, m, z = normals(3, device)
    t = timesteps(device)

    def model(x_t, told):
        assert x_t is x and told is t
        return m

    mean, *rest = gd.p_mean_variance(model, x, t, clip)
    expected, *expected_rest = truth.p_mean_variance(model, x, t, clip)
    check(mean, expected, step_magnitude(truth, x, m, t), device)
    check_variances(rest, expected_rest, device)
    result = gd.p_sample(model, x, t, clip, noise=z)
    check(result, truth.p_sample(model, x, t, clip, noise=z), step_magnitude(truth, x, m, t, z), device)
    assert torch.equal(result[0], mean[0])  # no noise at t = 0
    assert torch.equal(gd.p_mean_variance(model, x, t, clip_denoised=clip)[0], mean)
    if clip:
        assert torch.equal(gd.p_mean_variance(model, x, t)[0], mean)
        assert torch.equal(gd.p_sample(model, x, t, noise=z), result)


@backends
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 4, 2, 3), (0, 3), (3, 0)])
def test_any_number_of_dimensions(backend, shape, device):
    gd, truth = pair(backend=backend)
    x, m, z = normals(3, device, shape)
    t = torch.arange(shape[0], device=device) * 300
    result = gd.p_sample(lambda *_: m, x, t, noise=z)
    check(result, truth.p_sample(lambda *_: m, x, t, noise=z), step_magnitude(truth, x, m, t, z), device)
    variance = (1 - gd.alphas_cumprod.to(device)[t]).reshape(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(gd.q_mean_variance(x, t)[1].double(), variance, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------- t, noise, out


@backends
def test_rng_draws_what_randn_gives(backend, device):
    """p_sample has stream 0 and draw t, q_sample stream 2 and draw t, unless the Philox has its own."""
    gd, _ = pair(backend=backend)
    x, m = normals(2, device)
    t, seed = timesteps(device), 2**64 - 1
    randn = ddpm_ext.randn if backend == "fused" else ddpm_ext.reference.randn
    ids = torch.tensor([5, 2**56 - 1, 0, 7, 2**40, 1], device=device)
    steps = ((0, lambda **o: gd.p_sample(lambda *_: m, x, t, **o)), (2, lambda **o: gd.q_sample(x, t, **o)))
    for own in ({}, {"draw": 3}, {"stream": 77}, {"draw": 2**32 - 1, "stream": 255}):
        for stream, step in steps:
            each = [(Philox(seed, ids[i : i + 1]), {"stream": stream, "draw": int(t[i])} | own) for i in range(6)]
            z = torch.cat([randn((1, *SHAPE[1:]), rng, device=device, **how) for rng, how in each])
            assert torch.equal(step(rng=Philox(seed, ids, **own)), step(noise=z))


@backends
def test_seeds(backend, device):
    """torch.manual_seed repeats the noise, which is the same for both backends."""
    (gd, _), (other, _) = pair(backend=backend), pair()
    x, m = normals(2, device)
    t = timesteps(device)
    options = {"steps": 2, "record": "last", "progress": False, "device": device}
    for draw in (
        lambda gd: gd.q_sample(x, t),
        lambda gd: gd.p_sample(lambda *_: m, x, t),
        lambda gd: gd.train_losses(lambda x_t, _: x_t, x, t),
        lambda gd: gd.p_sample_loop(lambda *_: m, SHAPE, **options),
    ):
        torch.manual_seed(1)
        first, second = draw(gd), draw(gd)
        torch.manual_seed(1)
        assert torch.equal(draw(gd), first) and not torch.equal(first, second)
        torch.manual_seed(1)
        torch.testing.assert_close(draw(other), first, rtol=1e-4, atol=1e-4)


@backends
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: SimpleNamespace(sample=m)], ids=["tensor", "sample"])
def test_the_models_call_and_arguments_that_stay(backend, wrap, device):
    """It gets x_t and t, and returns a tensor, or an object that holds one as diffusers' models do."""
    gd, _ = pair(backend=backend)
    x, m, z = normals(3, device)
    t, seen = timesteps(device), []
    copies = [v.clone() for v in (x, m, z, t)]

    def model(x_t, told):
        seen.append((x_t.clone(), told))
        return wrap(m)

    plain = lambda *_: m  # noqa: E731
    assert torch.equal(gd.p_sample(model, x, t, noise=z), gd.p_sample(plain, x, t, noise=z))
    assert torch.equal(gd.p_mean_variance(model, x, t)[0], gd.p_mean_variance(plain, x, t)[0])
    for at, steps in ((t, t), (0, torch.zeros_like(t)), (999, torch.full_like(t, 999))):
        assert gd.train_losses(model, x, at, z) == gd.train_losses(plain, x, at, z)
        assert torch.equal(seen[-1][0], gd.q_sample(x, at, z)) and torch.equal(seen[-1][1], steps)
    options = {"steps": 2, "rng": Philox(0), "record": "last", "progress": False, "device": device}
    assert torch.equal(gd.p_sample_loop(model, SHAPE, **options), gd.p_sample_loop(plain, SHAPE, **options))
    gd.q_posterior_mean_variance(x, z, t)
    gd.predict_start_from_noise(x, t, z)
    assert len(seen) == 7 and all(torch.equal(a, b) for a, b in zip((x, m, z, t), copies, strict=True))


@backends
def test_zero_terminal_snr(backend, device):
    """If alphas_cumprod is 0, x_0 is the sign of x_t - m, even if the two are close, and 0 if they are equal."""
    x = torch.tensor([[0.5, -0.3, 1.0, -2.0, 3.0, 0.1]], device=device)
    m = torch.tensor([[0.25, 0.1, 1.0 - 2**-23, -2.0 - 2**-21, -3.0, 0.1]], device=device)
    gd = GaussianDiffusion(3, torch.tensor([0.1, 0.2, 1.0]), backend=backend)
    mean, _, _ = gd.p_mean_variance(lambda *_: m, x, 2)
    # alphas[2] is 0: the mean is posterior_mean_coef1 * x_0 alone
    torch.testing.assert_close(float64(mean), gd.posterior_mean_coef1[2] * float64(x - m).sign(), rtol=2.0**-22, atol=0)


# -------------------------------------------------------------------------------------------- gradients, and a loop


@backends
@predictions
@clips
def test_gradients_of_p_mean_variance(backend, prediction, clip, device):
    """In x_t, directly and through the model, and in the model's parameters."""
    x, w, found = *normals(1, device), torch.tensor(0.9, device=device), []
    for d, of in zip(pair(prediction, backend=backend), (torch.clone, float64), strict=True):
        x_t, factor = (of(v).requires_grad_() for v in (x, w))
        mean = d.p_mean_variance(lambda x, _, factor=factor: factor * x + 0.1 * x**2, x_t, timesteps(device), clip)[0]
        weight = torch.linspace(-1, 1, mean.numel(), dtype=torch.float64).reshape(mean.shape)
        found.append([float64(g) for g in torch.autograd.grad((float64(mean) * weight).sum(), (x_t, factor))])
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6 * true.abs().max().item())


@backends
def test_sampling_builds_no_graph(backend, device):
    gd, _ = pair(backend=backend)
    x, m, z = (v.requires_grad_() for v in normals(3, device))
    w, graphs = torch.nn.Parameter(torch.tensor(0.5, device=device)), []

    def model(x_t, t):
        graphs.append((w * m).requires_grad)
        return w * m

    result = gd.p_sample(model, x, timesteps(device), noise=z)
    last = gd.p_sample_loop(model, tuple(x.shape), steps=2, record="last", progress=False, device=device)
    assert not result.requires_grad and not last.requires_grad and torch.is_grad_enabled()
    assert graphs == [False] * 3
    assert gd.p_mean_variance(model, result, 3)[0].requires_grad


def test_sample_defaults(device):
    gd, options = GaussianDiffusion(20), {"steps": 2, "progress": False, "device": device, "rng": Philox(3)}
    for given, shape, more in (((4,), (8, 3, 4, 4), {}), ((4, 2, 1), (2, 1, 4, 4), {"dtype": torch.float16})):
        found = gd.sample(lambda x_t, _: x_t, *given, **options, **more)
        expected = gd.p_sample_loop(lambda x_t, _: x_t, shape, record="all", **options, **more)
        assert np.array_equal(found, expected) and np.shape(found) == (2, *shape)
