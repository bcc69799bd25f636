"""The gradients of the tutorial's methods, and the defaults of its `sample`."""

import torch
from support.comparison import backends, clips, float64, normals, pair, predictions, timesteps
from torch import nn

from ddpm_ext import GaussianDiffusion


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
