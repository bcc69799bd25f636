"""What schedules, grids, spacings and samplers refuse: the error names the argument, what came and what is expected."""

import math

import pytest
import torch
from support.refused import refused

from ddpm_ext import StepTable
from ddpm_ext.tables import samplers
from ddpm_ext.tables.beta_quantile import beta_quantile
from ddpm_ext.tables.flow_grids import flow_grid, flow_shift, flow_sigmas, flow_spaced_grid
from ddpm_ext.tables.grid import Grid, grid_of_levels, make_grid
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA, ddim, ddpm, dpmpp_2m_sde, eta_argument, repaint, sa_solver
from ddpm_ext.tables.schedules import make_betas, rescale_zero_terminal_snr
from ddpm_ext.tables.sigma_grids import align_your_steps_grid, karras_grid, linear_quadratic, log_snr_grid
from ddpm_ext.tables.spacing import spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
SIGMA = torch.linspace(1, 0, 50, dtype=torch.float64)
GRID = make_grid(LEVELS, [900, 100, 20])
BARE = Grid(GRID.timestep, GRID.alphas_cumprod, GRID.betas)  # without a schedule
TABLE = ddpm(GRID)
GOOD = (3, 1, 0.1, 0.2)  # an interval of restart
UP = make_grid(LEVELS, [1, 100], final=LEVELS[900].item())
MOST = 1.0008  # eta of ddim over GRID, whose first step leaves the least room
TWO, ONES, FALLING = torch.arange(2), torch.ones(3), torch.tensor([2.0, 1, 0])
BETWEEN = ("dpm_2", "dpm_2_ancestral", "dpmpp_2s", "edm", "restart")  # call the model between the grid's timesteps

SCHEDULES = [
    (lambda: make_betas("squared", 10), ValueError, "beta_schedule is 'squared'.*'linear'.*'cosine'"),
    (lambda: make_betas([0.1, 0.2], 2), TypeError, "beta_schedule is a list"),
    (lambda: make_betas(torch.tensor([1, 1]), 2), TypeError, "betas .*int64"),
    (lambda: make_betas(torch.full((3,), 0.1), 2), ValueError, r"betas .*\(3,\).*\(2,\)"),
    (lambda: make_betas(torch.full((200,), 0.99), 200), ValueError, r"betas: alphas_cumprod\[161\] is 0 in float64"),
    (lambda: make_betas(torch.tensor([0.1, 0.0, 0.3]), 3), ValueError, r"betas\[1\] is .*expected 0 < beta"),
    (lambda: make_betas(torch.tensor([0.1, 0.2, math.nan]), 3), ValueError, r"betas\[2\] is .*expected 0 < beta"),
    (lambda: make_betas("linear", True), TypeError, "timesteps is True"),
    (lambda: make_betas("linear", 19), ValueError, r"timesteps is 19.*'linear'.*20"),
    (lambda: rescale_zero_terminal_snr([0.1, 0.2]), TypeError, "betas is a list"),
    (lambda: rescale_zero_terminal_snr(torch.tensor([0.1])), ValueError, r"betas have shape \(1,\)"),
    (lambda: rescale_zero_terminal_snr(torch.tensor([1, 2])), TypeError, "betas have dtype torch.int64"),
    (lambda: beta_quantile(SIGMA, 0.6, 11), ValueError, "beta is 11, expected 0 < beta <= 10"),
]
GRIDS = [
    (lambda: make_grid(LEVELS, [5, 5]), ValueError, "the same timestep twice in a row, 5, expected"),
    (lambda: make_grid(LEVELS, [0.5]), TypeError, "timestep has dtype torch.float32, expected int64"),
    (lambda: make_grid(LEVELS, torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"timestep has shape \(2, 2\)"),
    (lambda: make_grid(LEVELS + 1, [5]), ValueError, "alphas_cumprod reaches from"),
    (lambda: make_grid(LEVELS, [5], final=1.5), ValueError, "final is 1.5"),
    (lambda: make_grid(LEVELS, [5], betas=LEVELS[:3]), ValueError, r"betas have shape \(3,\)"),
    (lambda: GRID[::2], ValueError, "grid is sliced with a step of 2, expected none"),
    (lambda: grid_of_levels(TWO, ONES, torch.ones(2)), ValueError, r"noise has shape \(2,\)"),
    (lambda: grid_of_levels(TWO, ONES, FALLING / 0), ValueError, "noise reaches from .* to (inf|nan)"),
    (lambda: grid_of_levels(TWO, ONES * 0, FALLING), ValueError, r"signal\[2\] and noise\[2\]"),
    (lambda: grid_of_levels(torch.arange(3), ONES, FALLING), ValueError, r"timestep has shape \(3,\), .* \(2,\)"),
    (lambda: grid_of_levels(TWO, ONES, FALLING.clamp(min=1)), ValueError, "the same ratio twice in a row"),
    (lambda: grid_of_levels(lambda _, n: n[:1], ONES, FALLING), ValueError, r"returns a tensor of shape \(1,\), expe"),
    (lambda: grid_of_levels(lambda *_: 3, ONES, FALLING), TypeError, "timestep returns is a int"),
    (lambda: karras_grid(LEVELS, 0), ValueError, "steps is 0"),
    (lambda: karras_grid(LEVELS, 5, rho=0), ValueError, "rho is 0"),
    (lambda: log_snr_grid(LEVELS.flip(0), 5), ValueError, "does not fall"),
    (lambda: karras_grid(torch.tensor([0.5, 0.0]), 5), ValueError, "reaches 0 or 1"),
    (lambda: align_your_steps_grid(LEVELS, 5, model="sd3"), ValueError, "model is 'sd3', expected 'sd15' or"),
    (lambda: align_your_steps_grid(LEVELS, 5, model="svd"), ValueError, "reaches a sigma of 14.61, expected 700"),
    (lambda: flow_shift(SIGMA, 0), ValueError, "shift is 0, expected shift > 0"),
    (lambda: flow_sigmas(0), ValueError, "steps is 0"),
    (lambda: flow_sigmas(5, least=0), ValueError, "least is 0, expected 0 < least <= 1"),
    (lambda: flow_sigmas(5, shift=3.0, mu=1.0), ValueError, "mu is 1.0 with shift 3.0"),
    (lambda: flow_sigmas(5, terminal=1.0), ValueError, "terminal is 1.0, expected 0 < terminal < 1"),
    (lambda: flow_sigmas(1, terminal=0.1), ValueError, "sigma ends at 1.0, expected less than 1"),
    (lambda: flow_sigmas(5, curve="lu"), ValueError, "curve is 'lu', expected 'karras' or 'exponential' or 'beta'"),
    (lambda: flow_grid(torch.tensor([0.5, 0.7])), ValueError, r"sigma and final are \[0.5, 0.6"),
    (lambda: flow_grid(torch.tensor([0.5]), final=-0.1), ValueError, "expected falling numbers from 1 to 0"),
    (lambda: flow_spaced_grid(SIGMA, 3, "log_snr"), ValueError, "spacing is 'log_snr', expected for a flow 'karras'"),
]
SPACED = [
    (lambda: spaced_timesteps(1000, None, "ddim999"), ValueError, "no stride takes 999 of 1000"),
    (lambda: spaced_timesteps(100, None, "10,95"), ValueError, "section 1 is to give 95 timesteps, expected 1 to 50"),
]
ARGUMENTS = [
    (lambda: ddpm(GRID, variance="large"), ValueError, "variance is 'large', expected 'fixed_small' or .* 'learned_v"),
    (lambda: samplers.ddim_inverse(GRID), ValueError, "grid does not ascend"),
    (lambda: samplers.ddim_inverse(GRID, prediction="x_prev"), ValueError, r"prediction is 'x_prev'.*expected another"),
    (lambda: samplers.tcd(GRID, eta=1.5), ValueError, r"eta is 1.5, expected 0 <= eta <= 1"),
    (lambda: samplers.tcd(BARE), ValueError, "grid has no schedule, in which tcd counts"),
    (lambda: samplers.flow_sde(GRID, variant="cps"), ValueError, "variant is 'cps', expected 'flow_grpo' or"),
    (lambda: samplers.unipc(GRID, solver="bh3"), ValueError, "solver is 'bh3', expected 'bh2' or 'bh1'"),
    *((lambda s=SAMPLERS[s]: s(GRID, order=5), ValueError, "order is 5") for s in ("deis", "lms", "unipc")),
    *((lambda s=SAMPLERS[s]: s(GRID, order=2.0), TypeError, "order is 2.0") for s in ("deis", "lms", "unipc")),
    (lambda: sa_solver(GRID, predictor_order=4), ValueError, "predictor_order is 4, expected 1 <= predictor_order < 4"),
    (lambda: sa_solver(GRID, interval=(200, "800")), TypeError, "interval is '800'"),
    (lambda: samplers.edm(GRID, s_churn=-1.0), ValueError, "s_churn is -1.0"),
    (lambda: samplers.edm(GRID, s_tmin=math.nan), ValueError, "s_tmin is nan"),
    (lambda: samplers.restart(GRID, intervals=[(1, 1, 0.1, 0.2)]), ValueError, r"intervals\[0\]'s n is 1"),
    (lambda: samplers.restart(GRID, intervals=[GOOD, (3, 0, 0.1, 0.2)]), ValueError, r"intervals\[1\]'s k is 0"),
    (lambda: samplers.restart(GRID, intervals=[(3, 1, 0.2, 0.1)]), ValueError, r"\[0\] has t_min 0.2 and t_max 0.1"),
    (lambda: samplers.restart(GRID, intervals=[], s_noise=-1), ValueError, "s_noise is -1"),
    (lambda: repaint([1]), TypeError, "table is a list, expected a StepTable"),
    (lambda: repaint(TABLE, jump_length=0), ValueError, "jump_length is 0, expected 1 <= jump_length"),
    (lambda: repaint(TABLE, jump_n_sample=0), ValueError, "jump_n_sample is 0, expected 1 <= jump_n_sample"),
    (lambda: repaint(TABLE[::2]), ValueError, "table does not descend, .* each to start where one ended"),
    (lambda: repaint(StepTable([1, 0], *[[0, 0]] * 4)), ValueError, "table does not descend"),
    (lambda: repaint(SAMPLERS["dpmpp_2m"](GRID)), ValueError, "table has history"),
    (lambda: ddim(GRID, eta=MOST + 1e-4), ValueError, rf"in step 0, from timestep 900, .* expected at most {MOST}$"),
    (lambda: ddim(GRID, eta=3 * MOST), ValueError, rf"expected at most {MOST}$"),
    (lambda: ddim(UP, eta=0.5), ValueError, "grid's step 0, from timestep 1, goes up to more noise"),
    (lambda: ddpm(UP), ValueError, "grid's step 0, from timestep 1, goes up to more noise, expected steps down"),
    (lambda: linear_quadratic(4, linear_steps=5), ValueError, "linear_steps is 5, expected 1 <= linear_steps < 5"),
    *((lambda s=SAMPLERS[s]: s(GRID, prediction="x_prev"), ValueError, "'x_prev'.*between its times") for s in BETWEEN),
    *((lambda s=SAMPLERS[s]: s(BARE), ValueError, "own levels alone.*grid_of_levels with a func") for s in BETWEEN),
    *((lambda s=s: s(LEVELS), TypeError, f"{n}: grid is a Tensor, expected a Grid") for n, s in SAMPLERS.items()),
    *(
        (lambda s=s: s(GRID, prediction="noise"), ValueError, "prediction is 'noise', expected 'eps' or 'x0' or 'v' or")
        for s in SAMPLERS.values()
    ),
]


@pytest.mark.parametrize("call, error, message", [*SCHEDULES, *GRIDS, *SPACED, *ARGUMENTS])
def test_refused(call, error, message):
    refused(error, message, call)


@pytest.mark.parametrize("eta, error", [(-1, ValueError), (math.nan, ValueError), (True, TypeError), ("1", TypeError)])
def test_eta_as_an_option(eta, error):
    assert dpmpp_2m_sde(GRID, eta=0.0) == SAMPLERS["dpmpp_2m"](GRID)
    assert ddim(GRID, eta=MOST).s[0] > ddim(GRID, eta=1.0).s[0]  # the largest that is taken
    over = samplers.euler_ancestral(GRID, eta=40.0)  # all the noise that there is
    assert over.c1.abs().max() < 1e-6 and torch.allclose(over.s**2, 1 - GRID.after)
    assert samplers.euler_ancestral(GRID, eta=0.0) == samplers.euler(GRID)
    assert samplers.lcm(GRID, timestep_scaling=0.01) != samplers.lcm(GRID)
    for name, sampler in SAMPLERS.items():
        assert sampler.__name__ == name  # which error messages show
        has_one = "ancestral" in name or "sde" in name or name in ("ddim", "dpmpp_2s", "sa_solver", "tcd")
        assert has_one == (name in WITH_ETA) and eta_argument(sampler, None) == {}
        assert eta_argument(sampler, 0) == ({"eta": 0.0} if has_one else {})
        if not has_one:
            refused(ValueError, f"eta is 0.5, but sampler '{name}' has none, expected None", eta_argument, sampler, 0.5)
        refused(error, "eta is", eta_argument, sampler, eta)
        if name in WITH_ETA:
            assert eta_argument(sampler, 0.5) == {"eta": 0.5}
            refused(error, "eta is", sampler, GRID, eta=eta)


def test_without_a_schedule_tcd_takes_no_noise():
    assert samplers.tcd(BARE, eta=0.0) == ddim(BARE) and samplers.tcd(GRID[1:]) == samplers.tcd(
        make_grid(LEVELS, [100, 20])
    )
