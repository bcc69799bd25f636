"""Samplers on normal data, whose exact flow and distributions are known: their orders, first rows and last rows."""

import re
from pathlib import Path

import pytest
import torch
from support.any_loop import OWN, AnyLoop, fits, process
from support.gaussian import SIGMA, best_prediction, denoised, flow, loop, push, take, variance_of, weights

from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA, dpmpp_2m_sde, euler
from ddpm_ext.tables.schedules import SCHEDULES, make_betas
from ddpm_ext.tables.spacing import spaced_grid, spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
ZERO_TERMINAL = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])
TWO_CALLS = ("heun", "edm", "restart", "dpm_2", "dpm_2_ancestral", "dpmpp_2s")
HISTORY = [
    name
    for name, sampler in SAMPLERS.items()
    if (table := sampler(make_grid(LEVELS, [900, 600, 300]))).history and not table.cu.any() and name not in TWO_CALLS
]

# ------------------------------------------------------------------------------------------------------------- orders

TABLE = re.findall(
    r"^\| (`\"\w+\"`(?:, `\"\w+\"`)*) \| ([^|]+) \|",
    (Path(__file__).resolve().parents[2] / "docs" / "sampling.md").read_text(),
    re.MULTILINE,
)
ORDINALS = {"second order": 2, "third order": 3, "fourth order": 4}
# By the lines of the table in docs/sampling.md: the highest that a line names, and without one the first.
ORDERS = {
    name: max((order for words, order in ORDINALS.items() if words in text), default=1)
    for names, text in TABLE
    for name in re.findall(r"\w+", names)
}
SPACED = [name for name in (*SCHEDULES, *OWN) if name != "flow" and fits(name, "log_snr")]
# As many inner steps as there are steps, and noise that is not inflated.
OPTIONS = {
    "edm": lambda steps: {"s_churn": 5.0, "s_tmax": 3.0, "s_noise": 1.0},
    "restart": lambda steps: {"intervals": ((steps // 5, 2, 0.3, 2.0), (steps // 8, 1, 1.0, 5.0))},
}
# With their own noise and without. Models for lcm, and for noise of tcd, are no denoisers: tests/loop/test_any_loop.py.
CASES = [(name, {}) for name in SAMPLERS if name not in ("lcm", "tcd")] + [(name, {"eta": 0.0}) for name in WITH_ETA]
CASES += [("flow_sde", {"variant": "dance_grpo", "eta": 0.4})]


def best(row, x, mean):
    return denoised(row.signal_now, row.noise_now, x, mean)


def off_the_distribution(name, options, schedule, prediction, steps):
    """The relative error of the variance at the schedule's least level, by steps of equal length in log sigma."""
    of = process(schedule, prediction)
    grid = spaced_grid(of.alphas_cumprod, of.betas, steps + 1, "log_snr", scale=of.schedule.scale)
    options = options | OPTIONS.get(name, lambda steps: {})(steps)
    table = SAMPLERS[name](grid, prediction=prediction, **options)
    model = AnyLoop(schedule, prediction, name, {}).model(best)
    *_, x, _ = weights(table, table.signal_now[0].item(), table.noise_now[0].item(), model)
    last = table[-1]
    return abs(variance_of(x) / ((last.signal_now * SIGMA) ** 2 + last.noise_now**2) - 1)


def off_the_flow(name, steps, exact):
    """How far a sample ends from where the flow takes it, by steps of equal length in sigma, from 3 to 0.5.

    The first `exact` rows keep what they keep and leave the sample on the flow, since they are of lower order.
    """
    levels = 1 / (1 + torch.linspace(3, 0.5, steps + 1, dtype=torch.float64) ** 2)
    table = SAMPLERS[name](Grid(torch.arange(steps, 0, -1), levels, 1 - levels[:-1] / levels[1:]))
    x, start, history = 2.0, levels[0].item(), []
    for i, row in enumerate(table):
        m = best_prediction(row.signal_now**2, x, "eps")
        x0, after = take(row, x, m, history=history)
        history = push(row, history, x0, x, m)
        x = flow(2.0, start, row.signal_after**2) if i < exact else after
    return abs(x - flow(2.0, start, levels[-1].item()))


@pytest.mark.parametrize("name, options", CASES)
def test_errors_fall_as_the_order_says(name, options):
    """An error that is next to none already, where two parts of it cancel, need not fall as fast."""
    order, number = ORDERS[name], CASES.index((name, options))
    schedules = [SPACED[(number + i) % len(SPACED)] for i in (0, 3)]
    predictions = [SPACED_PREDICTIONS[(number + i) % len(SPACED_PREDICTIONS)] for i in (0, 1)]
    for schedule, prediction in zip(schedules, predictions, strict=True):
        coarse, fine = (
            off_the_flow(name, steps, order)
            if order == 4
            else off_the_distribution(name, options, schedule, prediction, steps)
            for steps in (80, 160)
        )
        assert fine < 0.1**order and (coarse / fine > 2 ** (0.9 * order) or fine < 0.003**order), (schedule, prediction)


# ----------------------------------------------------------------------------------------------------- first and last


def deterministic(name, grid):
    return SAMPLERS[name](grid, **({"eta": 0.0} if name in WITH_ETA else {}))


@pytest.mark.parametrize("name", [*HISTORY, *TWO_CALLS])
def test_from_pure_noise(name):
    """Sigma is infinite there: the first step is Euler's alone, and the next one begins as if it were the first."""
    table = deterministic(name, make_grid(ZERO_TERMINAL, [999, 600, 300, 0]))
    first, then = table[:1], deterministic(name, make_grid(ZERO_TERMINAL, [600, 300, 0]))
    allowed = {"draw", "k0", "k1", "g1"}
    if name == "edm":  # whose first row reaches the level of the second step's churn, which depends on their number
        assert then.b[0] == 0 and table.signal_after[0] == then.signal_after[0]
        assert first.timestep[0] == 999 and first.c0**2 + first.c1**2 > 0
    else:
        euler_row = euler(make_grid(ZERO_TERMINAL, [999, 600]))[:1]
        if name == "restart":  # whose timesteps are floats
            allowed |= {"timestep"}
        assert first.diff(euler_row).columns.keys() <= allowed and table[1:].diff(then).columns.keys() <= {"draw"}
    if name == "dpmpp_2m":  # with noise, too
        first, after = dpmpp_2m_sde(make_grid(ZERO_TERMINAL, [999, 600, 0]))[0], LEVELS[600].item()
        assert (first.c0, first.s, first.c1) == pytest.approx((after**0.5, (1 - after) ** 0.5, 0), rel=1e-14)


@pytest.mark.parametrize("name", HISTORY)
def test_a_thousand_steps(name):
    """Differences of neighbouring levels lose digits, of which enough remain."""
    grid = make_grid(LEVELS, spaced_timesteps(1000))
    arguments = {"order": 3} if name in ("unipc", "deis") else {"eta": 0.0} if name in WITH_ETA else {}
    table = SAMPLERS[name](grid, **arguments)
    *_, (_, _, x) = loop(table, 0.5, lambda row, x: best_prediction(row.signal_now**2, x, "eps"))
    assert x == pytest.approx(flow(0.5, grid.now[0].item(), 1.0), abs=2e-3)
