"""Samplers on normal data, whose exact flow and distributions are known: their orders, first rows and last rows."""

import pytest
import torch
from support.gaussian import best_prediction, flow, loop, marginal, moments, push, take

from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA, dpmpp_2m_sde, euler
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import log_snr_grid
from ddpm_ext.tables.spacing import spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
ZERO_TERMINAL = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])
TWO_CALLS = ("heun", "edm", "restart", "dpm_2", "dpm_2_ancestral", "dpmpp_2s")
HISTORY = [
    name
    for name, sampler in SAMPLERS.items()
    if (table := sampler(make_grid(LEVELS, [900, 600, 300]))).history and not table.cu.any() and name not in TWO_CALLS
]
WHOLE = {"lower_order_final": False}


def even_in_log_sigma(steps):
    """Down to the schedule's smallest sigma, from where rounding does not matter yet."""
    grid = log_snr_grid(LEVELS, steps + 1)
    return Grid(grid.timestep[:-1], grid.alphas_cumprod[:-1], grid.betas[:-1], grid.schedule)


def even_in_sigma(steps):
    """From 3 to 0.5: steps of equal length, for which the weights of iPNDM and PLMS are made."""
    levels = 1 / (1 + torch.linspace(3, 0.5, steps + 1, dtype=torch.float64) ** 2)
    return Grid(torch.arange(steps, 0, -1), levels, 1 - levels[:-1] / levels[1:])


def off_the_distribution(grid, table, rel=1e-11):
    """The relative error of the variance at the end of a loop, whose mean is exact."""
    levels = dict(zip(grid.timestep.tolist(), grid.now.tolist(), strict=True))
    *_, (mean, variance) = moments(table, levels, *marginal(grid.now[0].item()))
    exact_mean, exact_variance = marginal(grid.after[-1].item())
    assert mean == pytest.approx(exact_mean, rel=rel)
    return abs(variance / exact_variance - 1)


def off_the_flow(table, start, exact, prediction):
    """How far three samples end from where the probability flow takes them.

    The first `exact` rows keep what they keep and leave the sample on the flow: a first step of first order would
    otherwise leave an error of second order.
    """
    distances = []
    for first in (-2.0, 0.5, 3.0):
        x, history = first, []
        for i, row in enumerate(table):
            m = best_prediction(row.signal_now**2, x, prediction)
            x0, after = take(row, x, m, history=history)
            history = push(row, history, x0, x, m)
            x = flow(first, start, row.signal_after**2) if i < exact else after
        distances.append(abs(x - flow(first, start, table.signal_after[-1].item() ** 2)))
    return max(distances)


# The least order between 80 and 160 steps, and the largest error of samples whose standard deviation is 0.25. UniPC's
# corrector adds one to the order of its predictor.
ORDERS = [
    ("ddim", {}, even_in_log_sigma, 0, 0.98, 0.008),
    ("euler", {}, even_in_log_sigma, 0, 0.98, 0.008),
    ("dpmpp_2m", {}, even_in_log_sigma, 0, 1.97, 1.5e-4),
    ("heun", {}, even_in_log_sigma, 0, 1.97, 1.5e-4),
    ("dpm_2", {}, even_in_log_sigma, 0, 1.97, 1.5e-4),
    ("dpmpp_2s", {}, even_in_log_sigma, 0, 1.97, 1.5e-4),
    ("unipc", {"order": 2, **WHOLE}, even_in_log_sigma, 0, 2.95, 4e-4),
    ("unipc", {"order": 3, **WHOLE}, even_in_log_sigma, 0, 3.8, 4e-4),
    ("unipc", {"order": 3, "solver": "bh1", **WHOLE}, even_in_log_sigma, 0, 3.8, 4e-4),
    ("dpm_solver_2m", WHOLE, even_in_log_sigma, 0, 1.95, 4e-4),
    ("dpmpp_3m", WHOLE, even_in_log_sigma, 0, 1.95, 4e-4),  # see its docstring
    ("dpmpp_3m_sde", {"eta": 0.0, **WHOLE}, even_in_log_sigma, 0, 1.95, 4e-4),
    ("deis", {"order": 2, **WHOLE}, even_in_log_sigma, 0, 1.95, 4e-4),
    ("deis", {"order": 3, **WHOLE}, even_in_log_sigma, 3, 2.8, 4e-4),
    ("deis", {"order": 4, **WHOLE}, even_in_log_sigma, 3, 3.8, 4e-4),
    ("sa_solver", {"eta": 0.0, **WHOLE}, even_in_log_sigma, 0, 1.95, 4e-4),
    ("sa_solver", {"eta": 0.0, "predictor_order": 3, "corrector_order": 4, **WHOLE}, even_in_log_sigma, 0, 3.8, 4e-4),
    ("lms", {"order": 3}, even_in_log_sigma, 3, 2.8, 4e-4),
    ("lms", {}, even_in_log_sigma, 3, 3.7, 4e-4),
    ("ipndm", {}, even_in_sigma, 3, 3.7, 4e-4),
    ("plms", {}, even_in_log_sigma, 0, 1.95, 4e-4),  # whose weights are those of equal steps
    ("plms", {}, even_in_sigma, 4, 3.7, 4e-4),
]


@pytest.mark.parametrize("name, arguments, make, exact, least, largest", ORDERS)
def test_order_on_the_probability_flow(name, arguments, make, exact, least, largest):
    """A sample must end where the probability flow takes its starting point, whatever is predicted."""
    for prediction in ("eps", "x0", "v"):
        grids = [make(steps) for steps in (80, 160)]
        tables = [SAMPLERS[name](grid, prediction=prediction, **arguments) for grid in grids]
        coarse, fine = (
            off_the_flow(table, grid.now[0].item(), exact, prediction)
            for grid, table in zip(grids, tables, strict=True)
        )
        assert coarse / fine >= 2**least, prediction
        assert fine < largest


@pytest.mark.parametrize(
    "name, options, least, largest",
    [
        ("ddpm", {}, 0.93, 0.05),
        ("euler_ancestral", {}, 0.93, 0.05),
        ("euler_ancestral", {"eta": 0.5}, 0.93, 0.05),
        ("dpmpp_2m_sde", {}, 1.95, 5e-4),
        ("dpmpp_3m_sde", {"eta": 0.5, **WHOLE}, 2, 5e-4),
        ("dpmpp_3m_sde", WHOLE, 2, 5e-4),
        ("dpmpp_2s", {"eta": 1.0}, 1.95, 1e-3),
        ("dpm_2_ancestral", {"eta": 0.5}, 1.95, 1e-3),
        ("edm", {"s_churn": 5.0, "s_tmax": 3.0, "s_noise": 1.0}, 1.95, 1e-3),
        ("restart", {}, 1.95, 1e-3),
    ],
)
def test_order_of_the_distribution(name, options, least, largest):
    """With noise, from the distribution of x_T to that at the end."""
    errors = []
    for steps in (80, 160):
        grid = even_in_log_sigma(steps)
        if name == "restart":  # whose inner steps become shorter, too
            options = {"intervals": ((steps // 5, 2, 0.3, 2.0), (steps // 8, 1, 1.0, 5.0))}
        table = SAMPLERS[name](grid, **options)
        if name == "ddpm":  # its last row adds no noise, at any level
            grid, table = Grid(grid.timestep[:-1], grid.alphas_cumprod[:-1], grid.betas[:-1]), table[:-1]
        errors.append(off_the_distribution(grid, table))
    assert errors[0] / errors[1] > 2**least and errors[1] < largest


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
