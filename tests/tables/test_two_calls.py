"""Samplers whose steps are two calls of the model, and those that add noise between steps, against the papers'
algorithms on y = x / sqrt(alphas_cumprod) in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.gaussian import MU, SIGMA, marginal, moments, take

from ddpm_ext.tables.flow_grids import flow_grid, flow_shift
from ddpm_ext.tables.grid import Grid, grid_of_levels, make_grid
from ddpm_ext.tables.levels import edm_timestep
from ddpm_ext.tables.samplers import SAMPLERS, dpm_2, dpm_2_ancestral, dpmpp_2s, edm, euler, heun, restart
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid, log_snr_grid
from ddpm_ext.tables.spacing import spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
LOG_SIGMA = np.log(1 / LEVELS.numpy() - 1) / 2
GRIDS = {
    "linspace": make_grid(LEVELS, spaced_timesteps(1000, 8)),
    "noisy": make_grid(LEVELS, spaced_timesteps(1000, 6, "trailing"), final=LEVELS[0].item()),
    "karras": karras_grid(LEVELS, 11),
    "one": make_grid(LEVELS, [400]),
}
TWICE = {"dpm_2": dpm_2, "dpm_2_ancestral": dpm_2_ancestral, "dpmpp_2s": dpmpp_2s, "edm": edm, "restart": restart}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
clips = pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])


class Denoiser:
    """x0 of a model that returns given eps. It notes the sigmas at which it is asked."""

    def __init__(self, outputs, clip):
        self.outputs, self.clip, self.asked = iter(outputs), clip, []

    def __call__(self, y, sigma):
        self.asked.append(sigma)
        x0 = y - sigma * next(self.outputs)
        return x0 if self.clip is None else np.clip(x0, *self.clip)


def heun_step(denoise, y, sigma, after, last):
    """Karras et al. 2022, algorithm 1, lines 4 to 8."""
    slope = (y - denoise(y, sigma)) / sigma
    end = y + (after - sigma) * slope
    if last:
        return end
    return y + (after - sigma) * (slope + (end - denoise(end, after)) / after) / 2


def assert_follows(table, grid, clip, algorithm, near=1e-10):
    """That a loop over the rows is algorithm(denoise, y, sigmas, noise), which returns y at the end."""
    generator = torch.Generator().manual_seed(3)
    outputs, noise = torch.randn(2, 300, 4, dtype=torch.float64, generator=generator).numpy()
    x = outputs[-1]
    sigmas = (1 / grid.alphas_cumprod - 1).sqrt().tolist()
    denoise = Denoiser(outputs, clip)
    expected = algorithm(denoise, x / grid.now[0].item() ** 0.5, sigmas, iter(noise))

    given, draws, before, calls = iter(outputs), iter(noise), 0.0, []
    for row in table:
        asked = row.b != 0
        x0, x = take(row, x, next(given) if asked else 0.0, before, next(draws) if row.s else 0.0, clip=clip)
        if asked:
            before = x0
            calls.append(row)
    assert x == pytest.approx(expected * table.signal_after[-1].item(), rel=near, abs=near)
    assert [row.noise_now / row.signal_now for row in calls] == pytest.approx(denoise.asked, rel=1e-12)
    # log sigma is linear between timesteps, and past the last one there is no other.
    timesteps = np.interp(np.log(denoise.asked), LOG_SIGMA, np.arange(1000))
    assert [row.timestep for row in calls] == pytest.approx(timesteps, abs=1e-8)
    ends = [level[i].item() for level in grid.pairs for i in (0, -1)]
    assert [table.signal_now[0], table.signal_after[-1], table.noise_now[0], table.noise_after[-1]] == ends
    assert torch.equal(table.signal_now[1:], table.signal_after[:-1])
    assert torch.equal(table.noise_now[1:], table.noise_after[:-1])


@clips
@grids
@pytest.mark.parametrize(
    "churn", [{}, {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 4.0, "s_noise": 1.1}, {"s_tmax": math.inf}, {"s_churn": 0}]
)
def test_edm(grid, clip, churn):
    """Karras et al. 2022, algorithm 2, and the defaults of their table 5."""
    options = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003, **churn}

    def algorithm(denoise, y, sigmas, noise):
        steps = len(sigmas) - 1
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            if options["s_churn"] and options["s_tmin"] <= sigma <= options["s_tmax"]:
                hat = sigma * (1 + min(options["s_churn"] / steps, math.sqrt(2) - 1))
                y = y + math.sqrt(hat**2 - sigma**2) * options["s_noise"] * next(noise)
                sigma = hat
            y = heun_step(denoise, y, sigma, after, i == steps - 1)
        return y

    table = edm(grid, **churn)
    assert_follows(table, grid, clip, algorithm)
    # The noise takes no launch of its own but before the first step.
    assert len(table) == 2 * len(grid) - 1 + bool((table.b == 0).any())
    assert (table.b[1:] != 0).all()
    if not options["s_churn"]:
        assert table == heun(grid)


@clips
@grids
@pytest.mark.parametrize(
    "intervals", [None, [(4, 1, 0.5, 3.0)], [(3, 2, 0.06, 0.3), (2, 3, 1.0, 2.0)], [(5, 1, 2.0, 90.0)], []]
)
def test_restart(grid, clip, intervals):
    """Xu et al. 2023, section 3. Noise leads from t_min to t_max in the launch of the step before."""
    used = [(3, 2, 0.06, 0.30)] if intervals is None else intervals

    def algorithm(denoise, y, sigmas, noise):
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            y = heun_step(denoise, y, sigma, after, i == len(sigmas) - 2)
            for n, k, low, high in used:
                nearest = min(sigmas[1:-1], key=lambda s, low=low: abs(s - low), default=None)
                if after != nearest or not after < high <= sigmas[0]:
                    continue
                rho = np.linspace(high ** (1 / 7), after ** (1 / 7), n) ** 7
                for _ in range(k):
                    y = y + math.sqrt(high**2 - after**2) * 1.1 * next(noise)
                    for start, end in pairwise(rho):
                        y = heun_step(denoise, y, start, end, last=False)
        return y

    table = restart(grid, s_noise=1.1, **({} if intervals is None else {"intervals": intervals}))
    assert_follows(table, grid, clip, algorithm)
    assert (table.b != 0).all()
    if not used:
        assert table == heun(grid)


@clips
@grids
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 40.0])
@pytest.mark.parametrize("name", ["dpm_2", "dpm_2_ancestral", "dpmpp_2s"])
def test_midpoints(grid, clip, name, eta):
    """Lu et al. 2022, algorithm 1, and 2022b, algorithm 1, down to less noise; eta 40 leaves none to step down to."""
    if name == "dpm_2":
        eta = 0.0

    def algorithm(denoise, y, sigmas, noise):
        for sigma, after in pairwise(sigmas):
            up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
            down = math.sqrt(after**2 - up**2)
            x0 = denoise(y, sigma)
            if down == 0:
                y = x0
            else:
                middle = math.sqrt(sigma * down)
                between = y + (middle - sigma) * (y - x0) / sigma
                x0 = denoise(between, middle)
                of_eps = y + (down - sigma) * (between - x0) / middle
                y = down / sigma * (y - x0) + x0 if name == "dpmpp_2s" else of_eps
            if up > 0:
                y = y + up * next(noise)
        return y

    table = SAMPLERS[name](grid, **({} if name == "dpm_2" else {"eta": eta}))
    # The root of a difference of numbers near 1, where a step removes all the noise that there was.
    assert_follows(table, grid, clip, algorithm, near=1e-7 if eta == 40 else 1e-10)
    assert eta < 40 or len(table) == len(grid)


@pytest.mark.parametrize("name", TWICE)
def test_from_pure_noise(name):
    """Sigma is infinite there, so that the first step is Euler's alone, and without churn."""
    levels = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])
    arguments = {"eta": 0.0} if name in ("dpm_2_ancestral", "dpmpp_2s") else {}
    table = TWICE[name](make_grid(levels, [999, 600, 300, 0]), **arguments)
    first, then = table[:1], TWICE[name](make_grid(levels, [600, 300, 0]), **arguments)
    if name == "edm":  # whose first row reaches the level of the second step's churn, which has a row of its own there
        assert then.b[0] == 0 and table.signal_after[0] == then.signal_after[0]
        then = then[1:]
    else:
        assert first.diff(euler(make_grid(levels, [999, 600]))[:1]).columns.keys() <= {"draw", "timestep"}
    assert first.c0**2 + first.c1**2 > 0 and first.timestep[0] == 999
    if name != "edm":  # there the churn of each step depends on their number
        assert table[1:].diff(then).columns.keys() <= {"draw"}


def even_grid(steps):
    grid = log_snr_grid(LEVELS, steps + 1)
    return Grid(grid.timestep[:-1], grid.alphas_cumprod[:-1], grid.betas[:-1], grid.schedule)


@pytest.mark.parametrize(
    "make",
    [
        lambda grid: dpmpp_2s(grid, eta=1.0),
        lambda grid: dpm_2_ancestral(grid, eta=0.5),
        lambda grid: dpm_2_ancestral(grid),
        lambda grid: edm(grid, s_churn=5.0, s_tmax=3.0, s_noise=1.0),
        lambda grid: restart(grid, intervals=((len(grid) // 5, 2, 0.3, 2.0), (len(grid) // 8, 1, 1.0, 5.0))),
    ],
    ids=["dpmpp_2s", "dpm_2_ancestral-half", "dpm_2_ancestral", "edm", "restart"],
)
def test_order_of_the_distribution(make):
    """With noise, too, the distribution at the end is the exact one up to an error of second order."""
    errors = []
    for steps in (80, 160):
        grid = even_grid(steps)
        levels = dict(zip(grid.timestep.tolist(), grid.now.tolist(), strict=True))
        mean, variance = [*moments(make(grid), levels, *marginal(grid.now[0].item()))][-1]
        exact_mean, exact_variance = marginal(grid.after[-1].item())
        assert mean == pytest.approx(exact_mean, rel=1e-11)
        errors.append(abs(variance / exact_variance - 1))
    assert errors[0] / errors[1] > 2**1.95  # measured 1.98 to 2.11 for the exponent
    assert errors[1] < 1e-3


def flow_levels(steps):
    """A grid, and how the level for which a model answers follows from its timestep."""
    t = flow_shift(torch.linspace(0.97, 0.02, steps + 1, dtype=torch.float64), 1.7)
    return flow_grid(t[:-1], final=t[-1].item()), lambda t: (1 - t / 1000, t / 1000)


def sigma_space(steps):
    """For a model that is called with EDM's c_noise."""
    sigma = torch.linspace(20 ** (1 / 3), 0.2, steps + 1, dtype=torch.float64) ** 3
    return grid_of_levels(edm_timestep, torch.ones_like(sigma), sigma), lambda t: (1.0, math.exp(4 * t))


def straight_lines(steps):
    """Levels of no name, which have a timestep of their own."""
    noise = torch.linspace(1, 0.02, steps + 1, dtype=torch.float64)
    return grid_of_levels(lambda signal, noise: noise**2, 1 - 0.8 * noise, noise), lambda t: (1 - 0.8 * t**0.5, t**0.5)


def distribution_at(signal, noise):
    return signal * MU, (signal * SIGMA) ** 2 + noise**2


@pytest.mark.parametrize("make", [flow_levels, sigma_space, straight_lines])
@pytest.mark.parametrize(
    "sampler, options",
    [
        (heun, {}),
        (dpm_2, {}),
        (dpmpp_2s, {}),
        (dpmpp_2s, {"eta": 0.5}),
        (dpm_2_ancestral, {}),
        (edm, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 3.0, "s_noise": 1.0}),
        (restart, {"intervals": ((9, 2, 0.3, 0.6),)}),
    ],
)
def test_order_between_given_levels(sampler, options, make):
    """The model answers for the level that its timestep says."""
    errors = []
    for steps in (100, 200):
        grid, levels_of = make(steps)
        if sampler is restart:  # whose inner steps become shorter, too
            options = {"intervals": [(steps // 6, *interval[1:]) for interval in options["intervals"]]}
        table = sampler(grid, prediction="x0", **options)
        start = [level[0].item() for level in grid.pairs]
        state, covariance = np.array([distribution_at(*start)[0], 0]), np.diag([distribution_at(*start)[1], 0])
        for row in table:
            signal, noise = levels_of(row.timestep)
            assert row.b == 0 or noise / signal == pytest.approx(row.noise_now / row.signal_now, rel=1e-10)
            mean, variance = distribution_at(signal, noise)

            def step(x, before, row=row, gain=signal * SIGMA**2 / variance, mean=mean):
                x0, after = take(row, x, MU + gain * (x - mean), before)
                return np.array([after, x0])

            constant = step(0.0, 0.0)
            slopes = np.stack([step(1.0, 0.0) - constant, step(0.0, 1.0) - constant], axis=1)
            state, covariance = slopes @ state + constant, slopes @ covariance @ slopes.T
            covariance[0, 0] += row.s**2
        exact_mean, exact_variance = distribution_at(table.signal_after[-1].item(), table.noise_after[-1].item())
        errors.append(abs(state[0] - exact_mean) + abs(covariance[0, 0] / exact_variance - 1))
    assert errors[0] / errors[1] > 2**1.8  # measured 1.86 to 2.06 for the exponent
    assert errors[1] < 5e-3


@pytest.mark.parametrize("name", TWICE)
def test_refusals(name):
    grid = make_grid(LEVELS, [900, 100, 20])
    with pytest.raises(ValueError, match=r"prediction is 'x_prev'.*calls the model between its timesteps"):
        TWICE[name](grid, prediction="x_prev")
    with pytest.raises(ValueError, match=r"timesteps for its own levels alone.*grid_of_levels with a function"):
        TWICE[name](Grid(grid.timestep, grid.alphas_cumprod, grid.betas))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"s_churn": -1.0}, ValueError, "s_churn is -1.0"),
        ({"s_tmin": math.nan}, ValueError, "s_tmin is nan"),
        ({"s_tmax": "1"}, TypeError, "s_tmax is '1'"),
        ({"s_noise": math.inf}, ValueError, "s_noise is inf"),
        ({"intervals": [(1, 1, 0.1, 0.2)]}, ValueError, r"intervals\[0\]'s n is 1"),
        ({"intervals": [(3, 1, 0.1, 0.2), (3, 0, 0.1, 0.2)]}, ValueError, r"intervals\[1\]'s k is 0"),
        ({"intervals": [(3, 1.0, 0.1, 0.2)]}, TypeError, r"intervals\[0\]'s k is 1.0"),
        ({"intervals": [(3, 1, 0.2, 0.1)]}, ValueError, r"intervals\[0\] has t_min 0.2 and t_max 0.1"),
        ({"intervals": [], "s_noise": -1}, ValueError, "s_noise is -1"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        (restart if "intervals" in arguments else edm)(make_grid(LEVELS, [900, 100, 20]), **arguments)
