"""Multistep samplers that k-diffusion has: its own functions in float64 over whole loops, with the noise fed in.

The environment variable DDPM_EXT_K_DIFFUSION names a checkout, of which k_diffusion/sampling.py is read.
"""

from __future__ import annotations

import pytest
import torch
from support.gaussian import push, take

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps

pytest_plugins = "support.k_diffusion"
SHAPE = (2, 3, 2)
LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
CASES = [
    ("lms", {}, "sample_lms", {}),
    ("lms", {"order": 3}, "sample_lms", {"order": 3}),
    ("dpmpp_3m", {"lower_order_final": False}, "sample_dpmpp_3m_sde", {"eta": 0.0}),
    ("dpmpp_3m_sde", {"lower_order_final": False}, "sample_dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"lower_order_final": False, "eta": 0.4}, "sample_dpmpp_3m_sde", {"eta": 0.4}),
]


@pytest.mark.parametrize("name, arguments, theirs, options", CASES)
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_whole_loop(sampling, name, arguments, theirs, options, clip, spacing, steps):
    spaced = karras_grid(LEVELS, steps) if spacing == "karras" else None
    grid = spaced or make_grid(LEVELS, spaced_timesteps(1000, steps, spacing))
    table = SAMPLERS[name](grid, prediction="x0", **arguments)
    generator = torch.Generator().manual_seed(2)
    outputs, noise = 2 * torch.randn(2, steps, *SHAPE, dtype=torch.float64, generator=generator)
    start = torch.randn(SHAPE, dtype=torch.float64, generator=generator)

    calls, draws = iter(outputs), iter(noise)
    found = getattr(sampling, theirs)(
        lambda x, sigma: next(calls) if clip is None else next(calls).clamp(*clip),
        start / grid.now[0].sqrt(),
        (1 / grid.alphas_cumprod - 1).sqrt(),
        disable=True,
        **({} if name == "lms" else {"noise_sampler": lambda sigma, after: next(draws)}),
        **options,
    )
    x, history = start.numpy(), []
    for row, m, z in zip(table, outputs.numpy(), noise.numpy(), strict=True):
        x0, after = take(row, x, m, z=z, clip=clip, history=history)
        history, x = push(row, history, x0, x, m), after
    largest = max(1.0, abs(outputs).max().item())
    # k-diffusion integrates LMS with a relative tolerance of 1e-4, which a polynomial does not need.
    assert abs(x - found.numpy() * table.signal_after[-1].item()).max() / largest < 1e-11
