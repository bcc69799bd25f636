"""Samplers of second order, against the exact solution for normal data and the papers' formulas in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.gaussian import flow, marginal, moments, take

from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.samplers import SAMPLERS, dpmpp_2m, dpmpp_2m_sde, euler, heun
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid, log_snr_grid
from ddpm_ext.tables.spacing import spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
PREDICTIONS = ("eps", "x0", "v")
STEPS = (20, 40, 80, 160)


def even_grid(steps):
    """Equal steps in log sigma, the last to the schedule's smallest sigma: the length of each of them goes to 0."""
    grid = log_snr_grid(LEVELS, steps + 1)
    return Grid(grid.timestep[:-1], grid.alphas_cumprod[:-1], grid.betas[:-1], grid.schedule)


def end(grid, table, mean, variance, prediction="eps"):
    """Mean and variance at the end of a loop that begins with N(mean, variance)."""
    levels = dict(zip(grid.timestep.tolist(), grid.now.tolist(), strict=True))
    return [*moments(table, levels, mean, variance, prediction)][-1]


def orders(errors):
    """The order of convergence, between each number of steps and twice that number."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()


# ------------------------------------------------------------------------------------------------- convergence


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2), ("heun", 2), ("dpm_2", 2), ("dpmpp_2s", 2)]
)
def test_order_on_the_probability_flow(name, order, prediction):
    """A sample must end where the probability flow takes its starting point."""
    errors = []
    for steps in STEPS:
        grid = even_grid(steps)
        table = SAMPLERS[name](grid, prediction=prediction)
        distances = []
        for x in (-2.0, 0.5, 3.0):
            exact = flow(x, grid.now[0].item(), grid.after[-1].item())
            mean, variance = end(grid, table, x, 0.0, prediction)
            assert variance == 0
            distances.append(abs(mean - exact))
        errors.append(max(distances))
    # measured: 0.97 to 0.993, and 1.90 to 1.99 (dpmpp_2m), 2.05 to 2.01 (heun)
    assert orders(errors) == pytest.approx([order] * 3, abs=0.12)
    assert orders(errors)[-1] == pytest.approx(order, abs=0.02)
    assert errors[-1] < (0.008 if order == 1 else 1.5e-4)  # for samples whose standard deviation is 0.25


@pytest.mark.parametrize(
    "name, eta, order",
    [("ddpm", None, 1), ("euler_ancestral", 1.0, 1), ("dpmpp_2m_sde", 0.5, 2), ("dpmpp_2m_sde", 1.0, 2)],
)
def test_order_of_the_distribution(name, eta, order):
    """From the distribution of x_T to that at the end."""
    errors = []
    for steps in STEPS:
        grid = even_grid(steps)
        table = SAMPLERS[name](grid, **({} if eta is None else {"eta": eta}))
        if name == "ddpm":  # its last row adds no noise, at any level
            grid = Grid(grid.timestep[:-1], grid.alphas_cumprod[:-1], grid.betas[:-1])
            table = table[:-1]
        mean, variance = end(grid, table, *marginal(grid.now[0].item()))
        exact_mean, exact_variance = marginal(grid.after[-1].item())
        assert mean == pytest.approx(exact_mean, rel=1e-12)
        errors.append(abs(variance / exact_variance - 1))
    # measured: 0.86 to 0.96, and 1.81 to 1.99
    assert orders(errors) == pytest.approx([order] * 3, abs=0.2)
    assert orders(errors)[-1] == pytest.approx(order, abs=0.05)
    assert errors[-1] < (0.05 if order == 1 else 5e-4)


@pytest.mark.parametrize("make", [log_snr_grid, karras_grid])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_clean_data(name, make):
    """Down to clean data, only the error of the last step remains, from the smallest sigma to 0."""
    grid = make(LEVELS, 40)
    first = "ddpm" if name == "dpmpp_2m_sde" else "euler"
    errors = []
    for sampler in (name, first):
        mean, variance = end(grid, SAMPLERS[sampler](grid), *marginal(grid.now[0].item()))
        exact_mean, exact_variance = marginal(1.0)
        assert mean == pytest.approx(exact_mean, rel=1e-12)
        errors.append(abs(variance / exact_variance - 1))
    assert errors[0] < 0.02 < 0.06 < errors[1]  # measured 0.005 to 0.011, and 0.088 to 0.18


# ------------------------------------------------------------------------------------------------ DPM-Solver++


def dpm_step(x, x0, before, z, levels, eta):
    """The papers' step from x at levels[1] to levels[2]. `before` is the x0 predicted at levels[0].

    Lu et al. 2022b: alpha^2 = alphas_cumprod, sigma^2 = 1 - alpha^2, lambda = ln(alpha / sigma), D = D_0 + D_1 / (2 r).
    """
    alpha, sigma = [level**0.5 for level in levels], [(1 - level) ** 0.5 for level in levels]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = lam[2] - lam[1]
    d = x0 if before is None else x0 + (x0 - before) / (2 * (lam[1] - lam[0]) / h)
    mean = sigma[2] / sigma[1] * math.exp(-eta * h) * x + alpha[2] * (1 - math.exp(-(1 + eta) * h)) * d
    return mean + sigma[2] * math.sqrt(1 - math.exp(-2 * eta * h)) * z


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 2.0])
@pytest.mark.parametrize("final", [1.0, LEVELS[0].item()], ids=["clean", "noisy"])
@pytest.mark.parametrize("steps", [2, 14, 15, 30])
def test_dpmpp_2m_is_the_formula(steps, final, eta):
    """The first step is of first order, and so is the last if it ends at clean data or there are fewer than 15."""
    grid = make_grid(LEVELS, spaced_timesteps(1001, steps + 1)[:-1] - 1, final=final)
    table = dpmpp_2m(grid) if eta == 0 else dpmpp_2m_sde(grid, eta=eta)
    assert len(table) == steps
    levels = [math.nan, *grid.alphas_cumprod.tolist()]
    x, m, h, z = random(4, steps, seed=1)
    for i, row in enumerate(table):
        x0, found = take(row, x[i], m[i], h[i], z[i], clip=(-1, 1))
        if i == steps - 1 and final == 1:
            assert (found, row.c0, row.c1, row.c3, row.s) == (x0, 1, 0, 0, 0)
            break
        first_order = i == 0 or (i == steps - 1 and steps < 15)
        assert (row.c3 == 0) == first_order
        expected = dpm_step(x[i], x0, None if first_order else h[i], z[i], levels[i : i + 3], eta)
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert dpmpp_2m_sde(grid, eta=0.0) == dpmpp_2m(grid)


def test_dpmpp_2m_from_pure_noise():
    """lambda is minus infinity there, so that the next step cannot extrapolate from the x0 of that step."""
    levels = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])
    grid = make_grid(levels, [999, 600, 300, 0])
    for table, s in ((dpmpp_2m(grid), 0), (dpmpp_2m_sde(grid), (1 - grid.after[0].item()) ** 0.5)):
        first, second, third, _ = table
        assert first.c0 == pytest.approx(grid.after[0].item() ** 0.5, rel=1e-14)
        assert first.c1**2 + s**2 == pytest.approx(1 - grid.after[0].item(), rel=1e-14)
        assert first.s == pytest.approx(s, rel=1e-14)
        assert first.c3 == second.c3 == 0
        assert third.c3 < 0


# ------------------------------------------------------------------------------------------------------- Heun


@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (-1.0, 1.0)])
@pytest.mark.parametrize(
    "grid", [make_grid(LEVELS, [999, 700, 400, 20]), karras_grid(LEVELS, 7), make_grid(LEVELS, [500])]
)
def test_heun_is_karras_algorithm(grid, clip):
    """On y = x / sqrt(alphas_cumprod): the mean of the derivatives at both ends, applied to the first y."""
    table, n = heun(grid), len(grid)
    assert len(table) == 2 * n - 1
    assert (table.s == 0).all()
    x, *outputs = random(2 * n, 5, seed=2)
    rows = iter(zip(table, outputs, strict=True))
    sigma = [*(1 / grid.now - 1).sqrt().tolist(), (1 / grid.after[-1].item() - 1) ** 0.5]
    roots = grid.after.sqrt().tolist()
    near = {"rel": 1e-11, "abs": 1e-11}
    y = x / grid.now[0].item() ** 0.5
    for i in range(n):
        row, m = next(rows)
        x0 = np.clip(y - sigma[i] * m, *clip)
        slope = (y - x0) / sigma[i]
        tried = y + (sigma[i + 1] - sigma[i]) * slope
        found_x0, x = take(row, x, m, clip=clip)
        assert row.timestep == grid.timestep[i] and row.c3 == 0
        assert found_x0 == pytest.approx(x0, **near)
        assert x == pytest.approx(tried * roots[i], **near)
        if i == n - 1:
            break
        row, m = next(rows)
        x0 = np.clip(tried - sigma[i + 1] * m, *clip)
        y = y + (sigma[i + 1] - sigma[i]) * (slope + (tried - x0) / sigma[i + 1]) / 2
        found_x0, x = take(row, x, m, found_x0, clip=clip)
        assert row.timestep == grid.timestep[i + 1]
        assert found_x0 == pytest.approx(x0, **near)
        assert x == pytest.approx(y * roots[i], **near)


def test_heun_from_pure_noise():
    """Sigma is infinite there. The step is Euler's, without a correction, which would be infinite as well."""
    levels = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])
    grid = make_grid(levels, [999, 600, 300, 0])
    table = heun(grid)
    assert table.timestep.tolist() == [999, 600, 300, 300, 0, 0]
    assert table[:1] == euler(grid)[:1]
    difference = table[1:].diff(heun(make_grid(levels, [600, 300, 0])))
    assert difference.rows == (5, 5)
    assert difference.columns.keys() <= {"draw"}
