"""Samplers that k-diffusion has: its own functions in float64 over whole loops, with the noise fed in.

The environment variable DDPM_EXT_K_DIFFUSION names a checkout, of which k_diffusion/sampling.py is read.
"""

from __future__ import annotations

import math

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
    ("dpmpp_3m_sde", {"lower_order_final": False}, "sample_dpmpp_3m_sde", {"eta": 1.0}),
    ("dpmpp_3m_sde", {"lower_order_final": False, "eta": 0.4}, "sample_dpmpp_3m_sde", {"eta": 0.4}),
    ("dpm_2", {}, "sample_dpm_2", {}),
    ("heun", {}, "sample_heun", {}),
    *[
        (name, {"eta": eta}, f"sample_{theirs}", {"eta": eta})
        for name, theirs in (("dpm_2_ancestral", "dpm_2_ancestral"), ("dpmpp_2s", "dpmpp_2s_ancestral"))
        for eta in (0.0, 0.4, 1.0)
    ],
    *[
        ("edm", churn, "sample_heun", churn)
        for churn in (
            {"s_churn": 0.0, "s_noise": 2.0},
            {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
            {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 3.0, "s_noise": 1.0},
        )
    ],
]


def arrivals(grid, options):
    """The sigmas at which the noise of each step arrives: where it ends, or with churn where it begins."""
    sigma = (1 / grid.alphas_cumprod - 1).sqrt()
    if "s_churn" not in options:
        return sigma[1:]
    low, high = options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)
    gamma = min(options["s_churn"] / len(grid), 2**0.5 - 1)
    return torch.where((low <= sigma) & (sigma <= high), sigma * (1 + gamma), sigma)[:-1]


@pytest.mark.parametrize("name, arguments, theirs, options", CASES)
@pytest.mark.parametrize(("clip", "spacing"), [(None, "leading"), ((-1.0, 1.0), "karras")])
@pytest.mark.parametrize("steps", [5, 20])
def test_whole_loop(monkeypatch, sampling, name, arguments, theirs, options, clip, spacing, steps):
    """Each call of the model is at their sigma, and the loop ends where theirs does."""
    spaced = karras_grid(LEVELS, steps) if spacing == "karras" else None
    grid = spaced or make_grid(LEVELS, spaced_timesteps(1000, steps, spacing))
    table = SAMPLERS[name](grid, prediction="x0", **arguments)
    generator = torch.Generator().manual_seed(2)
    outputs = 2 * torch.randn(2 * steps, *SHAPE, dtype=torch.float64, generator=generator)
    noise, start = outputs[:steps].flip(0) / 2, outputs[-1] / 2
    calls, draws, sigmas = iter(outputs), iter(noise), []

    def model(x, sigma):
        sigmas.append(sigma[0].item())
        return next(calls) if clip is None else next(calls).clamp(*clip)

    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))  # once a step, in heun
    arrive = arrivals(grid, options)
    found = getattr(sampling, theirs)(
        model,
        start / grid.now[0].sqrt(),
        (1 / grid.alphas_cumprod - 1).sqrt(),
        disable=True,
        **({"noise_sampler": lambda sigma, after: noise[(arrive - after).abs().argmin()]} if "eta" in options else {}),
        **options,
    )
    x, history, given, levels = start.numpy(), [], iter(outputs.numpy()), []
    for row in table:
        asked = row.b != 0 or row.c2 != 0
        m = next(given) if asked else 0.0
        z = noise[(arrive - row.noise_after / row.signal_after).abs().argmin()].numpy()
        x0, after = take(row, x, m, z, clip=clip, history=history)
        history, x = push(row, history, x0, x, m), after
        if asked:
            levels.append(row.noise_now / row.signal_now)
    assert levels == pytest.approx(sigmas, rel=1e-12)
    largest = max(1.0, abs(outputs).max().item())
    # k-diffusion integrates LMS with a relative tolerance of 1e-4, which a polynomial does not need.
    assert abs(x - found.numpy() * table.signal_after[-1].item()).max() / largest < 1e-11
