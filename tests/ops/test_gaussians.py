"""ddpm_ext.ops.gaussians against mpmath with 60 digits."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mpf

from ddpm_ext.ops.gaussians import discretized_gaussian_log_likelihood, normal_kl

DTYPES = [torch.float32, torch.float64]
DIGITS = 60

levels = st.integers(0, 255)
log_scales = st.one_of(st.floats(-20, 5), st.floats(-8, -2))
# the distance of the mean from the level: in standard deviations, in half bins, or any
offsets = st.one_of(
    st.tuples(st.just("sigmas"), st.floats(-55, 55)),
    st.tuples(st.just("half bins"), st.floats(-3, 3)),
    st.tuples(st.just("units"), st.floats(-3, 3)),
)


def in_dtype(value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def inputs(level, offset, log_scale, dtype):
    x, log_scale = in_dtype(level / 127.5 - 1, dtype), in_dtype(log_scale, dtype)
    unit = {"sigmas": math.exp(log_scale), "half bins": 1 / 255, "units": 1.0}[offset[0]]
    return x, in_dtype(x.item() + offset[1] * unit, dtype), log_scale


def exact(x, mean, log_scale):
    """log P, and its derivatives by the mean and by log_scale."""
    with mpmath.workdps(DIGITS):
        scale, distance, half = mpmath.exp(log_scale), mpf(x) - mpf(mean), mpf(1) / 255
        low, high = (distance - half) / scale, (distance + half) / scale
        density_low, density_high = mpmath.npdf(low), mpmath.npdf(high)
        low_slope, high_slope = low * density_low, high * density_high
        if x < -0.999:
            low, density_low, low_slope = -mpmath.inf, mpf(0), mpf(0)
        if x > 0.999:
            high, density_high, high_slope = mpmath.inf, mpf(0), mpf(0)
        if low > 0 or high == mpmath.inf:
            probability, log_p = mpmath.ncdf(-low) - mpmath.ncdf(-high), None
        elif high < 0 or low == -mpmath.inf:
            probability, log_p = mpmath.ncdf(high) - mpmath.ncdf(low), None
        else:
            outside = mpmath.ncdf(low) + mpmath.ncdf(-high)
            probability, log_p = 1 - outside, mpmath.log1p(-outside)
        log_p = mpmath.log(probability) if log_p is None else log_p
        in_mean = (density_low - density_high) / (probability * scale)
        return log_p, in_mean, (low_slope - high_slope) / probability


def likelihood(x, mean, log_scale):
    mean, log_scale = (value.clone().requires_grad_() for value in (mean, log_scale))
    log_p = discretized_gaussian_log_likelihood(x, mean=mean, log_scale=log_scale)
    return log_p.detach(), *torch.autograd.grad(log_p.sum(), (mean, log_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=250)
@given(levels, offsets, log_scales)
@example(100, ("sigmas", 50.0), -4.0)
@example(100, ("sigmas", -50.0), -7.0)
@example(0, ("sigmas", 50.0), -5.0)
@example(255, ("units", 2.0), -20.0)
@example(100, ("units", -1.5), -20.0)
@example(100, ("half bins", 1.0), -20.0)
@example(255, ("units", -2.0), -43.0)  # as narrow as float32 can represent
@example(100, ("units", 1.2), -43.0)
@example(100, ("half bins", 0.9), -43.0)
@example(100, ("units", 1 + 1 / 255), 0.0)  # where a formula that is not used here has an infinite derivative
@example(7, ("sigmas", 0.0), 5.0)
@example(7, ("units", 3.0), 5.0)
def test_likelihood(dtype, level, offset, log_scale):
    given = inputs(level, offset, log_scale, dtype)
    expected = exact(*(value.item() for value in given))
    found = likelihood(*given)
    epsilon, scale = torch.finfo(dtype).eps, math.exp(given[2])
    slope = abs(expected[1]) * scale  # counted in standard deviations
    end = 2.0**-60 / scale  # the rounding of a bin's ends in float64
    assert found[0].dtype == dtype and found[0] <= 0
    # measured in float32 over ten thousand examples: 2.7 and 0.25; 6 and 0.5; 3 and 1.2
    for value, truth, unit, relative, absolute, by_end in (
        (found[0], expected[0], 1, 6, 0.6, slope + 1),
        (found[1], expected[1], scale, 12, 1.5, 1),
        (found[2], expected[2], 1, 8, 3, slope + 1),
    ):
        error = abs(mpf(value.item()) - truth) * unit
        assert error <= epsilon * (relative * abs(truth) * unit + absolute) + 8 * end * by_end


def test_half_precision_counts_as_float32():
    x, mean = torch.tensor([-1.0, 0.5, 1.0]).bfloat16(), torch.tensor([-0.5, 0.25, 0.5]).half()
    found = discretized_gaussian_log_likelihood(x, mean=mean, log_scale=-3)
    assert found.dtype == torch.float32
    assert torch.equal(found, discretized_gaussian_log_likelihood(x.float(), mean=mean.float(), log_scale=-3.0))


# ------------------------------------------------------------------------------------------------ divergence

variances = st.floats(-46, 12)


def exact_kl(mean1, log_variance1, mean2, log_variance2):
    with mpmath.workdps(DIGITS):
        d = mpf(log_variance1) - mpf(log_variance2)
        distance = (mpf(mean1) - mpf(mean2)) ** 2 / mpmath.exp(log_variance2)
        return (mpmath.expm1(d) - d + distance) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=250)
@given(
    st.floats(-2, 2),
    st.one_of(st.floats(-1, 1), st.floats(-1e-6, 1e-6)),
    variances,
    st.one_of(st.floats(-30, 30), st.floats(-1, 1), st.floats(-1e-5, 1e-5)),
)
@example(0.3, 0.0, -46.0, 0.0)
@example(0.3, 0.0, -3.0, 0.5)
@example(0.3, 0.0, -3.0, -0.5)
def test_divergence(dtype, mean, distance, log_variance, d):
    given = [in_dtype(v, dtype).requires_grad_() for v in (mean, log_variance, mean + distance, log_variance + d)]
    found = normal_kl(*given)
    slopes = torch.autograd.grad(found, given)
    truth = exact_kl(*(value.item() for value in given))
    assert found.dtype == dtype and found >= 0
    # measured 3.2 if the difference d in the exponent is not rounded; float32 ends at 1e-38
    ulps = 8 + max(0, given[1].item() - given[3].item())
    assert abs(mpf(found.item()) - truth) <= ulps * torch.finfo(dtype).eps * truth + 1e-38
    first, second = np.exp([given[1].item() - given[3].item(), -given[3].item()])
    difference = given[0].item() - given[2].item()
    expected = (difference * second, math.expm1(given[1].item() - given[3].item()) / 2, -difference * second)
    for slope, value in zip(slopes, expected, strict=False):
        assert slope.item() == pytest.approx(value, rel=2 * ulps * torch.finfo(dtype).eps, abs=1e-30)
    in_last = (1 - first - difference**2 * second) / 2
    assert slopes[3].item() == pytest.approx(in_last, rel=1e-5, abs=1e-5)


def test_divergence_broadcasts():
    mean, log_variance = torch.randn(3, 2, 4), torch.randn(3, 1, 1)
    found = normal_kl(mean, log_variance, 0.0, 0)
    assert found.shape == mean.shape and found.dtype == torch.float32
    expanded = normal_kl(mean, log_variance.expand_as(mean), torch.zeros_like(mean), torch.zeros_like(mean))
    assert torch.equal(found, expanded)
    assert normal_kl(mean, log_variance, 0.0, torch.zeros((), dtype=torch.float64)).dtype == torch.float64


def test_second_derivatives():
    torch.manual_seed(0)
    given = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradgradcheck(normal_kl, given)
    x = torch.tensor([-1.0, 1 / 255, 1.0], dtype=torch.float64)
    mean = torch.tensor([0.1, -0.02, 0.3], dtype=torch.float64, requires_grad=True)
    for start in (-6.0, -4.0, -2.0):
        log_scale = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(
            lambda mean, log_scale: discretized_gaussian_log_likelihood(x, mean=mean, log_scale=log_scale),
            (mean, log_scale),
        )


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ((0.0, 0.0, 0.0, 0.0), TypeError, "mean1, log_variance1, mean2 and log_variance2 are no tensors, expected one"),
        ((torch.zeros(2), 0, "0", 0.0), TypeError, "mean2 is a str, expected a tensor or a number"),
        ((torch.zeros(2), 0, 0.0, True), TypeError, "log_variance2 is a bool, expected a tensor or a number"),
        ((torch.zeros(2), torch.ones(2).long(), 0, 0), TypeError, "log_variance1 has dtype torch.int64, expected a fl"),
        ((torch.zeros(2), 0, torch.zeros(3), 0), ValueError, r"have shapes \(2,\), \(3,\), expected such as broadcast"),
        ((torch.zeros(2), torch.zeros(2, device="meta"), 0, 0), ValueError, "log_variance1 is on meta, expected cpu"),
    ],
)
def test_bad_arguments(given, kind, message):
    with pytest.raises(kind, match=message):
        normal_kl(*given)


def test_x_must_be_a_float_tensor():
    for x, message in ((0.5, "x is a float, expected a tensor"), (torch.zeros(2).byte(), "x has dtype torch.uint8,")):
        with pytest.raises(TypeError, match=message):
            discretized_gaussian_log_likelihood(x, mean=torch.zeros(2), log_scale=-1.0)
