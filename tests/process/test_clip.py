"""Dynamic thresholding, and the ranges that x0 is clipped to."""

import math

import pytest
import torch
from support.loop_cases import PART, given, make_diffusion, model

from ddpm_ext import DynamicThreshold, ops, reference

F32, F64 = torch.float32, torch.float64


def test_the_bound_is_the_operators(device):
    """ops/test_scales.py compares it with torch's quantile."""
    for dtype, operators in ((F32, ops), (F64, reference)):
        x = 4 * given(0, PART, device, dtype)
        found = DynamicThreshold(0.9, 2.0).x_start_scale(x)
        assert found.dtype == dtype and torch.equal(found, operators.x_start_scale(x, quantile=0.9, maximum=2.0))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0.0,), ValueError, "quantile is 0.0, expected 0 < quantile <= 1"),
        ((1.5,), ValueError, "quantile is 1.5, expected 0 < quantile <= 1"),
        (("0.9",), TypeError, "quantile is '0.9', expected a number"),
        ((0.9, 0.5), ValueError, "maximum is 0.5, expected at least 1"),
        ((0.9, math.nan), ValueError, "maximum is nan, expected at least 1"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DynamicThreshold(*arguments)


def test_a_step_by_itself_takes_a_range_but_no_threshold(device):
    gd = make_diffusion()
    x = given(0, PART, device, F32)
    options = {"noise": x}
    for clip in ((-0.5, 0.25), [-2, 1]):
        t = torch.full((4,), 40, device=device)
        x0 = gd.predict_start_from_noise(x, t, model(x, t)).clamp(*clip)
        mean, expected = gd.p_mean_variance(model, x, 40, clip)[0], gd.q_posterior_mean_variance(x0, x, t)[0]
        torch.testing.assert_close(mean, expected, rtol=0, atol=5e-7)
        s = gd.posterior_variance[40].sqrt().item()
        torch.testing.assert_close(gd.p_sample(model, x, 40, clip, **options), mean + s * x, rtol=0, atol=5e-7)
    for step in (gd.p_sample, gd.p_mean_variance):
        with pytest.raises(TypeError, match=r"clip_denoised is DynamicThreshold.*, expected a bool or a range"):
            step(model, x, 40, DynamicThreshold())
        with pytest.raises(ValueError, match=r"clip_denoised is \(1, -1\), expected low <= high"):
            step(model, x, 40, (1, -1))
