"""On a CPU the noise of a training step stays in the memory that the gradient is then written to."""

from __future__ import annotations

import pytest
import torch
from support.launches import Operators

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.ops import fused

ROWS = torch.tensor([[0.8, 0.6], [1.0, 0.0], [-0.3, 2.0]])
OPTIONS = {"loss": "mse", "delta": 1.0, "reduction": "mean", "variational": False, "detach_mean": False}
WEIGHTS = torch.linspace(0.5, 2, 1000)
T = torch.tensor([0, 999, 500, 17])
RNG = Philox(7, sample_ids=torch.tensor([5, 0, 9, 2]))
SHAPES = [(4, 3, 16, 16), (4, 3, 5, 7), (4, 1), (4,), (4, 3, 33, 41)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(x, t):
    """x_t and its noise."""
    step = fused.LossStep(None, ROWS, t, x.device, noise=None, rng=RNG, **OPTIONS)
    return step.noised(x, ROWS, True), step.noise


@pytest.fixture
def kept(monkeypatch):
    """Where the noise of each training step lies, or None."""
    found, noised = [], fused.LossStep.noised

    def record(step, *arguments):
        x_t = noised(step, *arguments)
        found.append(None if step.noise is None else step.noise.data_ptr())
        return x_t

    monkeypatch.setattr(fused.LossStep, "noised", record)
    return found


def value_and_gradient(gd, x, output, *, t=T, **options):
    leaf = output.detach().requires_grad_()
    loss = gd.train_losses(lambda *_: leaf, x, t, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
def test_same_bits_as_noise_that_is_drawn_again(shape, prediction):
    gd = GaussianDiffusion(prediction=prediction)
    for given in LAYOUTS.values():
        for returned in LAYOUTS.values():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x, output = given(normal(*shape, seed=1)), returned(normal(*shape, seed=2).to(dtype))
                for options in ({}, {"loss": "huber", "reduction": "none", "weighting": WEIGHTS}, {"t": 600}):
                    got = value_and_gradient(gd, x, output, rng=RNG, **options)
                    with Operators():  # any mode: operators go through torch's dispatcher, which draws the noise again
                        expected = value_and_gradient(gd, x, output, rng=RNG, **options)
                    assert all(map(torch.equal, got, expected))
                    assert got[1].stride() == expected[1].stride()


def test_the_gradient_takes_the_memory_of_the_noise(kept):
    x = normal(4, 3, 16, 16, seed=1)
    for output in (x, x.contiguous(memory_format=torch.channels_last)):
        _, gradient = value_and_gradient(GaussianDiffusion(), x, output, rng=RNG)
        assert (gradient.data_ptr() == kept.pop()) is (output is x), "another layout needs memory of its own"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"prediction": "v"}, True),
        ({"prediction": "x0"}, False),  # the target needs no noise
        ({"variance": "learned_range"}, False),  # the gradient has two halves, which do not fit in
    ],
)
def test_where_it_is_kept(kept, options, expected):
    x, halves = normal(4, 3, 16, 16, seed=1), 1 + ("variance" in options)
    gd, leaf = GaussianDiffusion(**options), normal(4, 3 * halves, 16, 16, seed=2).requires_grad_()
    gd.train_losses(lambda *_: leaf, x, T, rng=RNG)
    with torch.no_grad():
        gd.train_losses(lambda *_: leaf, x, T, rng=RNG)
    assert [noise is not None for noise in kept] == [expected, False]


def test_what_is_not_kept():
    """Noise of 16 bits is not the noise that was drawn; and x_t may have a gradient in x_start."""
    x = normal(4, 3, 16, 16, seed=1)
    for other in (x.half(), x.bfloat16(), x.clone().requires_grad_()):
        x_t, noise = made(other, 0)
        assert noise is None and x_t.equal(fused.forward_process(other, ROWS, 0, rng=RNG))
        assert x_t.requires_grad is other.requires_grad
    with Operators():
        assert made(x, 0)[1] is None
