"""On a CPU the noise of a training step stays in the memory that the gradient is then written to."""

from __future__ import annotations

import pytest
import torch
from support.launches import Operators
from support.operators import DTYPES

from ddpm_ext import GaussianDiffusion, Philox

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
            for x_dtype, dtype in DTYPES:
                x, output = given(normal(*shape, seed=1).to(x_dtype)), returned(normal(*shape, seed=2).to(dtype))
                for options in ({}, {"loss": "huber", "reduction": "none", "weighting": WEIGHTS}, {"t": 600}):
                    got = value_and_gradient(gd, x, output, rng=RNG, **options)
                    with Operators():  # any mode: operators go through torch's dispatcher, which draws the noise again
                        expected = value_and_gradient(gd, x, output, rng=RNG, **options)
                    assert all(map(torch.equal, got, expected))
                    assert got[1].stride() == expected[1].stride()
