"""Samplers whose rows keep a history: convergence on the exact flow of normal data, and where a loop begins and ends."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import flow, moments

from ddpm_ext.tables.samplers import SAMPLERS, euler
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.spacing import Grid, karras_grid, log_snr_grid, make_grid, spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
PREDICTIONS = ("eps", "x0", "v")
STEPS = (40, 80, 160)


def even_in_log_sigma(steps):
    """Down to the schedule's smallest sigma, from where rounding does not matter yet."""
    grid = log_snr_grid(LEVELS, steps + 1)
    return Grid(grid.timestep[:-1], grid.alphas_cumprod[:-1], grid.betas[:-1])


def even_in_sigma(steps):
    """From 3 to 0.5: steps of equal length, for which the weights of iPNDM and PLMS are made."""
    levels = 1 / (1 + torch.linspace(3, 0.5, steps + 1, dtype=torch.float64) ** 2)
    return Grid(torch.arange(steps, 0, -1), levels, 1 - levels[:-1] / levels[1:])


def errors(name, arguments, make, prediction):
    """How far three samples end from where the probability flow takes them."""
    for steps in STEPS:
        grid = make(steps)
        table = SAMPLERS[name](grid, prediction=prediction, **arguments)
        levels = dict(zip(grid.timestep.tolist(), grid.now.tolist(), strict=True))
        distances = []
        for x in (-2.0, 0.5, 3.0):
            mean, variance = [*moments(table, levels, x, 0.0, prediction)][-1]
            assert variance == 0
            distances.append(abs(mean - flow(x, grid.now[0].item(), grid.after[-1].item())))
        yield max(distances)


# The least order between 80 and 160 steps. UniPC's corrector adds one to the order of its predictor.
ORDERS = [
    ("unipc", {"order": 1, "lower_order_final": False}, even_in_log_sigma, 1.95),  # measured 2.00
    ("unipc", {"order": 2, "lower_order_final": False}, even_in_log_sigma, 2.95),  # measured 3.00
    ("unipc", {"order": 2, "solver": "bh1", "lower_order_final": False}, even_in_log_sigma, 2.95),  # measured 3.03
    ("unipc", {"order": 3, "lower_order_final": False}, even_in_log_sigma, 3.8),  # measured 3.92
    ("unipc", {"order": 3, "solver": "bh1", "lower_order_final": False}, even_in_log_sigma, 3.8),  # measured 3.94
]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name, arguments, make, least", ORDERS)
def test_order_on_the_probability_flow(name, arguments, make, least, prediction):
    _, coarse, fine = errors(name, arguments, make, prediction)
    assert coarse / fine >= 2**least
    assert fine < 3e-4


HISTORY = [name for name, sampler in SAMPLERS.items() if sampler(make_grid(LEVELS, [900, 600, 300])).linear]


@pytest.mark.parametrize("name", HISTORY)
@pytest.mark.parametrize("grid", [make_grid(LEVELS, [500]), make_grid(LEVELS, [700, 200]), karras_grid(LEVELS, 12)])
def test_the_first_row_is_of_first_order(name, grid):
    """It is DDIM's, and every row reads as much history as there is."""
    table = SAMPLERS[name](grid)
    noisy = grid.after[0].item() < 1
    for column in ("a", "b", "c0", "c1", "c2"):
        expected = getattr(euler(grid), column)[0].item()
        if noisy or column != "c1":
            assert getattr(table, column)[0].item() == pytest.approx(expected, rel=1e-11, abs=1e-13)
    kept = 0
    for row in table:
        assert all(weight == 0 for weight in (row.h1, row.h2, row.h3)[kept:])
        kept += bool(row.k0 or row.k1)


@pytest.mark.parametrize("name", HISTORY)
def test_from_pure_noise(name):
    """Sigma is infinite there: the next step begins as if it were the first."""
    levels = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])
    table = SAMPLERS[name](make_grid(levels, [999, 800, 600, 300, 0]))
    assert table[:1].diff(euler(make_grid(levels, [999, 800]))[:1]).columns.keys() <= {"k0", "k1", "g0", "g1"}
    assert table[1:].diff(SAMPLERS[name](make_grid(levels, [800, 600, 300, 0]))).columns.keys() <= {"draw"}


@pytest.mark.parametrize("name", HISTORY)
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_clean_data(name, steps):
    """The last step goes to x0 by whatever history, and ends nearer to the exact sample than first order does."""
    grid = make_grid(LEVELS, spaced_timesteps(1000, steps, "trailing"))
    levels = dict(zip(grid.timestep.tolist(), grid.now.tolist(), strict=True))
    found = {}
    for sampler in (name, "euler"):
        table = SAMPLERS[sampler](grid)
        assert table.after[-1] == 1
        (mean, _), exact = [*moments(table, levels, 1.0, 0.0)][-1], flow(1.0, grid.now[0].item(), 1.0)
        found[sampler] = abs(mean - exact)
    assert found[name] < found["euler"]
