"""Levels of signal and noise: grids of them, and the scales of flow, sigma space and EDM."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ddpm_ext.tables import levels
from ddpm_ext.tables.grid import grid_of_levels
from ddpm_ext.tables.levels import flow, straight, unit_levels
from ddpm_ext.tables.schedules import edm, sigma_space

F64 = torch.float64
FLOW = torch.tensor([1.0, 0.9, 0.55, 0.3, 0.02, 0.0], dtype=F64)
SIGMAS = torch.tensor([80.0, 14.6, 2.5, 0.4, 0.002, 0.0], dtype=F64)
CURVED = 1.2 - FLOW**2, FLOW**0.5  # of no name


def grid(signal, noise, **options):
    return grid_of_levels(torch.arange(len(signal) - 1, 0, -1), signal, noise, **options)


@pytest.mark.parametrize(("signal", "noise"), [(1 - FLOW, FLOW), (torch.ones_like(SIGMAS), SIGMAS), CURVED])
def test_grid_of_levels(signal, noise):
    """It holds the levels; alphas_cumprod is the signal's share of the power, and beta what a step adds."""
    found = grid(signal, noise)
    for ours, given in zip(found.pairs, (signal, noise), strict=True):
        torch.testing.assert_close(ours, given, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.alphas_cumprod, signal**2 / (signal**2 + noise**2), rtol=1e-15, atol=0)
    torch.testing.assert_close(found.betas, 1 - found.now / found.after, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found[1:3].pairs[1], noise[1:4], rtol=1e-10, atol=0)
    columns = found.levels
    assert torch.equal(columns["signal_after"][:-1], columns["signal_now"][1:])
    assert torch.equal(columns["noise_after"][:-1], columns["noise_now"][1:])
    assert found.unscaled().pairs[0].tolist() == found.alphas_cumprod.sqrt().tolist()


def test_timesteps_by_a_function():
    """A part of the grid has it, too, and the grid of its variance-preserving samples has it for their levels."""
    found = grid_of_levels(lambda signal, noise: 5 * noise, *CURVED)
    torch.testing.assert_close(found.timestep, 5 * CURVED[1][:-1], rtol=1e-15, atol=0)
    part = found[2:4]
    torch.testing.assert_close(part.unscaled().timestep_of(*unit_levels(part.now)), part.timestep, rtol=1e-10, atol=0)


@pytest.mark.parametrize("make", [flow, levels.sigma_space])
def test_levels_between_lie_on_the_line(make):
    """Flow and sigma space are lines, so known levels of them give all others, also beyond the outermost."""
    between = unit_levels(torch.tensor([0.9999, 0.97, 0.5, 0.2, 1e-3], dtype=F64))
    known = unit_levels(torch.tensor([0.99, 0.6, 0.55, 0.1], dtype=F64))
    nodes = tuple(level * make(*known) for level in known)
    torch.testing.assert_close(straight(*between, nodes=nodes), make(*between), rtol=1e-12, atol=0)
    one = straight(*between, nodes=tuple(level[:1] for level in nodes))
    torch.testing.assert_close(one, make(*known)[:1].expand(5), rtol=1e-15, atol=0)


@pytest.mark.parametrize("make", [edm, partial(edm, sigma_data=1.7), sigma_space])
def test_levels_between_are_those_of_a_schedule_with_more(make):
    """By the scale of a schedule with few levels. Clean data is as the data set has it."""
    few, more = make(SIGMAS[:-1].flip(0)[::2]), make(SIGMAS[:-1].flip(0))
    unit = unit_levels(levels.power_share(more.signal, more.noise))
    for level, expected in zip(unit, (more.signal, more.noise), strict=True):
        torch.testing.assert_close(level * few.scale(*unit), expected, rtol=1e-10, atol=0)
    assert few.scale(torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)) == 1
