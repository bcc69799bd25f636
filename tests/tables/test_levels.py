"""Levels of signal and noise in grids and rows, and the scales of flow and sigma space.

Whole loops at any scale, and EDM's, are in tests/loop and tests/process, each in test_noise_schedules.py.
"""

import math
from dataclasses import replace

import pytest
import torch

from ddpm_ext.tables.grid import Jumps, grid_of_levels, make_grid
from ddpm_ext.tables.levels import flow, sigma_space, straight, unit_levels
from ddpm_ext.tables.samplers import SAMPLERS, ddim
from ddpm_ext.tables.schedules import make_betas

F64 = torch.float64
FLOW = torch.tensor([1.0, 0.9, 0.55, 0.3, 0.02, 0.0], dtype=F64)
SIGMAS = torch.tensor([80.0, 14.6, 2.5, 0.4, 0.002, 0.0], dtype=F64)
CURVED = 1.2 - FLOW**2, FLOW**0.5  # of no name


def grid(signal, noise, **options):
    return grid_of_levels(torch.arange(len(signal) - 1, 0, -1), signal, noise, **options)


GRIDS = {
    "flow": grid(1 - FLOW, FLOW),
    "flow, by its name": grid(1 - FLOW, FLOW, scale=flow),
    "sigma": grid(torch.ones_like(SIGMAS), SIGMAS),
    "curved": grid(CURVED[0], CURVED[1]),
}


@pytest.mark.parametrize(("signal", "noise"), [(1 - FLOW, FLOW), (torch.ones_like(SIGMAS), SIGMAS), CURVED])
def test_grid_of_levels(signal, noise):
    """It holds the levels; alphas_cumprod is the signal's share of the power, and beta what a step adds."""
    found = grid(signal, noise)
    for ours, given in zip(found.pairs, (signal, noise), strict=True):
        torch.testing.assert_close(ours, given, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.alphas_cumprod, signal**2 / (signal**2 + noise**2), rtol=1e-15, atol=0)
    torch.testing.assert_close(found.betas, 1 - found.now / found.after, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found[1:3].pairs[1], noise[1:4], rtol=1e-10, atol=0)
    levels = found.levels
    assert torch.equal(levels["signal_after"][:-1], levels["signal_now"][1:])
    assert torch.equal(levels["noise_after"][:-1], levels["noise_now"][1:])
    assert found.unscaled().pairs[0].tolist() == found.alphas_cumprod.sqrt().tolist()


def test_timesteps_by_a_function():
    """A part of the grid has it, too, and the grid of its variance-preserving samples has it for their levels."""
    found = grid_of_levels(lambda signal, noise: 5 * noise, *CURVED)
    torch.testing.assert_close(found.timestep, 5 * CURVED[1][:-1], rtol=1e-15, atol=0)
    part = found[2:4]
    torch.testing.assert_close(part.unscaled().timestep_of(*unit_levels(part.now)), part.timestep, rtol=1e-10, atol=0)


@pytest.mark.parametrize("make", [flow, sigma_space])
def test_levels_between_lie_on_the_line(make):
    """Flow and sigma space are lines, so known levels of them give all others, also beyond the outermost."""
    between = unit_levels(torch.tensor([0.9999, 0.97, 0.5, 0.2, 1e-3], dtype=F64))
    known = unit_levels(torch.tensor([0.99, 0.6, 0.55, 0.1], dtype=F64))
    nodes = tuple(level * make(*known) for level in known)
    torch.testing.assert_close(straight(*between, nodes=nodes), make(*between), rtol=1e-12, atol=0)
    one = straight(*between, nodes=tuple(level[:1] for level in nodes))
    torch.testing.assert_close(one, make(*known)[:1].expand(5), rtol=1e-15, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_have_levels_of_the_grids_kind(sampler):
    """Those in the middle of a step, too: signal and noise of flow sum to 1, and sigma space has a signal of 1."""
    for name, of_noise in (("flow", 1), ("sigma", 0)):
        levels = GRIDS[name]
        table = SAMPLERS[sampler](replace(levels, schedule=levels.alphas_cumprod.flip(0)))
        for signal, noise in ((table.signal_now, table.noise_now), (table.signal_after, table.noise_after)):
            torch.testing.assert_close(signal + of_noise * noise, torch.ones_like(signal), rtol=1e-10, atol=0)


def test_variance_preserving_rows_keep_their_bits():
    """Without a scale nothing is multiplied; steps that do not follow one on another have levels, too."""
    steps = make_grid((1 - make_betas("linear", 1000)).cumprod(0), [900, 500, 0])
    table = ddim(Jumps(steps.timestep, steps.now, steps.after, steps.alphas))
    assert table == ddim(steps) and table.noise_now.tolist() == [math.sqrt(1 - power) for power in steps.now.tolist()]
    assert ddim(replace(steps, scale=lambda signal, noise: torch.ones_like(signal))) == table
