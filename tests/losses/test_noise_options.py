"""Offset noise and input perturbation: the model's input, its target, and the streams of the noise."""

from __future__ import annotations

import math

import pytest
import torch
from support.comparison import backends, normals, timesteps
from support.refusals import refuse

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox

SHAPE = (6, 3, 5, 7)
RNG = Philox(11, 2**40)


def drawn(shape, t, stream, rng=RNG):
    """The contract's noise (batch, ...) in float64, with draw t for each sample."""
    one = [
        ddpm_ext.randn((1, *shape[1:]), Philox(rng.seed_value, rng.first_id + i), draw=int(draw), stream=stream)
        for i, draw in enumerate(t)
    ]
    return torch.cat(one).double()


class Seen:
    """A model that records its inputs."""

    def __init__(self, output):
        self.output = output

    def __call__(self, x_t, t):
        self.x_t = x_t.detach().clone()
        return self.output

    def check(self, gd, x, z, t):
        levels = gd.alphas_cumprod[t.cpu()].reshape(-1, *[1] * (x.dim() - 1))
        expected = levels**0.5 * x.double().cpu() + (1 - levels) ** 0.5 * z
        torch.testing.assert_close(self.x_t.cpu().double(), expected, rtol=1e-6, atol=2e-6)


@backends
@pytest.mark.parametrize("shape", [SHAPE, (6, 4), (6, 4, 9)], ids=str)
def test_offset_noise(backend, shape, device):
    """One more normal (stream 4) for all elements of a channel, in x_t and in the target."""
    x, m = normals(2, device, shape)
    for prediction in ("eps", "v"):
        gd = GaussianDiffusion(1000, prediction=prediction, backend=backend)
        t = timesteps(device)
        z = drawn(shape, t, 2) + 0.3 * drawn((6, shape[1]), t, 4).reshape(6, shape[1], *[1] * (len(shape) - 2))
        model = Seen(m)
        loss = gd.train_losses(model, x, t, rng=RNG, offset_noise=0.3, reduction="none")
        levels = gd.alphas_cumprod[t.cpu()].reshape(-1, *[1] * (len(shape) - 1))
        x64, m64 = x.cpu().double(), m.cpu().double()
        model.check(gd, x, z, t)
        target = z if prediction == "eps" else levels**0.5 * z - (1 - levels) ** 0.5 * x64
        torch.testing.assert_close(loss.cpu().double(), ((m64 - target) ** 2).flatten(1).mean(1), rtol=2e-6, atol=0)


@backends
def test_input_perturbation(backend, device):
    """More noise (stream 5) in x_t but not in the target: Ning et al. 2023, algorithm 1."""
    x, m = normals(2, device)
    gd, t, model = GaussianDiffusion(1000, backend=backend), timesteps(device), Seen(m)
    each = t.cpu()
    z, more = drawn(SHAPE, each, 2), drawn(SHAPE, each, 5)
    for gamma in (0.1, 0.5, 0.1):
        loss = gd.train_losses(model, x, t, rng=RNG, input_perturbation=gamma, reduction="none")
        model.check(gd, x, z + gamma * more, each)
        plain = gd.train_losses(model, x, t, rng=RNG, reduction="none")
        assert torch.equal(loss, plain)
    given = z.to(device, torch.float32)
    torch.manual_seed(2)
    first = gd.train_losses(model, x, t, given, input_perturbation=0.1), model.x_t
    torch.manual_seed(2)
    gd.train_losses(model, x, t, given, input_perturbation=0.1)
    assert torch.equal(model.x_t, first[1])
    gd.train_losses(model, x, t, given, input_perturbation=0.1)
    assert not torch.equal(model.x_t, first[1])


@backends
def test_own_streams_and_draws(backend, device):
    """A stream of the rng replaces that of the noise only, a draw of the rng replaces all three."""
    (x,), t = normals(1, device), timesteps(device)
    gd, model, rng = GaussianDiffusion(backend=backend), Seen(x), Philox(11, 2**40, stream=40, draw=9)
    gd.train_losses(model, x, t, rng=rng, offset_noise=0.3, input_perturbation=0.2)
    z, moves, more = (drawn(shape, [9] * 6, s) for shape, s in ((SHAPE, 40), (SHAPE[:2], 4), (SHAPE, 5)))
    model.check(gd, x, z + 0.3 * moves[..., None, None] + 0.2 * more, t)


NOISE, FLAT = torch.ones(3, 2, 4), torch.ones(3)


@backends
@pytest.mark.parametrize(
    ("kind", "words", "change"),
    [
        (ValueError, ["offset_noise is -0.1", "number"], {"offset_noise": -0.1}),
        (ValueError, ["offset_noise is nan", "number"], {"offset_noise": math.nan}),
        (ValueError, ["offset_noise is inf", "number"], {"offset_noise": math.inf}),
        (TypeError, ["offset_noise is True", "a number"], {"offset_noise": True}),
        (ValueError, ["input_perturbation is -0.1", "number"], {"input_perturbation": -0.1}),
        (ValueError, ["offset_noise is given with noise", "offset already"], {"offset_noise": 0.1, "noise": NOISE}),
        (ValueError, [r"offset_noise: x_start has shape \(3,\)"], {"offset_noise": 0.1, "x_start": FLAT}),
    ],
)
def test_refusals(backend, kind, words, change, device):
    refuse("train_losses", backend, device, kind, words, **change)
