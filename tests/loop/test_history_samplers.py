"""Loops of samplers that keep a history or add noise between steps, fused and in torch, against rows in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gaussian import TIMESTEPS, diffusion, exact_model, push, take

import ddpm_ext
from ddpm_ext import Philox
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import spaced_timesteps

SHAPE, CLIP = (3, 2, 5), (0.1, 0.45)
HISTORY = [
    name for name, sampler in SAMPLERS.items() if sampler(make_grid(diffusion().alphas_cumprod, [90, 60, 30])).k0.any()
]
backends = pytest.mark.parametrize("backend", ["fused", "reference"])


@backends
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler", [*HISTORY, "edm", "restart", "dpmpp_2s", "lcm", "tcd"])
def test_every_step(device, backend, prediction, sampler):
    """The clip holds for what is kept, too."""
    gd, rng = diffusion(backend=backend, prediction=prediction), Philox(5)
    model, steps = exact_model(gd), 9
    options = {"sampler": sampler, "steps": steps, "clip_denoised": CLIP, "progress": False, "device": device}
    found = gd.p_sample_loop(model, SHAPE, rng=rng, **options)

    table = SAMPLERS[sampler](make_grid(gd.alphas_cumprod, spaced_timesteps(TIMESTEPS, steps)), prediction=prediction)
    x, history, clipped = ddpm_ext.randn(SHAPE, rng, stream=1, draw=0).double().numpy(), [], False
    assert len(found) == len(table)
    for row, ours in zip(table, found, strict=True):
        m = model(torch.from_numpy(x), torch.full(SHAPE[:1], row.timestep)).numpy()  # not used before edm's first step
        z = ddpm_ext.randn(SHAPE, rng, draw=row.draw).double().numpy()
        x0, after = take(row, x, m, z, clip=CLIP, history=history)
        clipped |= bool((x0 == CLIP[0]).any() or (x0 == CLIP[1]).any())
        history, x = push(row, history, x0, x, m), after
        # In the first row x0 is 158 times a difference in float32; measured 1.9e-5, factor 3.
        np.testing.assert_allclose(ours, x, rtol=0, atol=6e-5)
    assert clipped
