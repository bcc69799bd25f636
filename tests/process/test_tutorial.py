"""The gradients of the tutorial's methods, and the defaults of its `sample`."""

import pytest
import torch
from support.comparison import backends, clips, float64, normals, pair, predictions, start_magnitude, timesteps
from torch import nn

from ddpm_ext import GaussianDiffusion


def gradients(function, tensors):
    leaves = [v.detach().clone().requires_grad_() for v in tensors]
    output = float64(function(*leaves))
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    (output * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


@backends
@predictions
@clips
@pytest.mark.parametrize("t", ["tensor", 20])
def test_gradients_of_p_mean_variance(backend, prediction, clip, t, device):
    """The gradients in x_t, directly and through the model, and in the model's parameters."""
    gd, truth = pair(prediction, backend=backend)
    (x,) = normals(1, device)
    w = torch.tensor(0.9, device=device)
    steps = timesteps(device) if t == "tensor" else torch.full((6,), t, device=device)
    t = steps if t == "tensor" else t

    def run(d, t, x, w):
        return d.p_mean_variance(lambda x_t, _: w * x_t + 0.1 * x_t**2, x, t, clip)[0]

    mine, mine_w = gradients(lambda x, w: run(gd, t, x, w), (x, w))
    true, true_w = gradients(lambda x, w: run(truth, steps, x, w), (float64(x), float64(w)))
    largest = gradient_terms(truth, steps, x, w)
    error = (float64(mine) - true).abs()
    # measured 2.4 half-ulps of the terms, factor 3
    assert (error <= 8 * 2.0**-24 * largest).all(), (error / largest).max() * 2**24
    terms = (largest * float64(x).abs()).sum()
    # measured 0.06 half-ulps (rounding averages out), factor 8
    assert abs(float64(mine_w) - true_w) <= 0.5 * 2.0**-24 * terms


def gradient_terms(truth, t, x, w):
    """A bound of the terms of the mean's gradient in x_t: |c0| (|a| + |b| |dm/dx|) + |c1|."""
    slope = float64(w).abs() + 0.2 * float64(x).abs()
    ones = torch.ones_like(slope)
    start = start_magnitude(truth, ones, slope, t)
    return truth.q_posterior_mean_variance(start, ones, t)[0]


@backends
def test_sampling_builds_no_graph(backend, device):
    gd, _ = pair(backend=backend)
    x, m, z = (v.requires_grad_() for v in normals(3, device))
    w, graphs = nn.Parameter(torch.tensor(0.5, device=device)), []

    def model(x_t, t):
        graphs.append((w * m).requires_grad)
        return w * m

    result = gd.p_sample(model, x, timesteps(device), noise=z)
    last = gd.p_sample_loop(model, tuple(x.shape), steps=2, record="last", progress=False, device=device)
    assert not result.requires_grad and not last.requires_grad and torch.is_grad_enabled()
    assert graphs == [False] * 3
    assert gd.p_mean_variance(model, result, 3)[0].requires_grad


def test_sample_defaults(device):
    gd, options = GaussianDiffusion(20), {"steps": 2, "progress": False, "device": device}
    assert [v.shape for v in gd.sample(lambda x_t, _: x_t, 4, **options)] == [(8, 3, 4, 4)] * 2
    positional = gd.sample(lambda x_t, _: x_t, 4, 2, 1, record="last", dtype=torch.float16, **options)
    assert (positional.shape, positional.dtype) == ((2, 1, 4, 4), torch.float16)
