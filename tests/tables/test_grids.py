"""Grids of steps: a schedule's own timesteps, levels between them as sigmas, and the shifted sigmas of flows."""

import pytest
import torch
from support.choices import for_many

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.flow_grids import flow_grid, flow_shift, flow_sigmas
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import (
    ALIGN_YOUR_STEPS,
    SIGMA_GRIDS,
    align_your_steps_grid,
    karras_grid,
    linear_quadratic,
)
from ddpm_ext.tables.spacing import spaced_grid

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
LOG_SIGMA = (1 / LEVELS - 1).sqrt().log()


def test_grid_of_neighbours_has_the_schedules_betas():
    betas = make_betas("linear", 1000)
    levels = (1 - betas).cumprod(0)
    grid = make_grid(levels, [999, 998, 500, 1, 0], betas=betas)
    assert torch.equal(grid.betas[[0, 3, 4]], betas[[999, 1, 0]])
    torch.testing.assert_close(grid.betas[[1, 2]], 1 - levels[[998, 500]] / levels[[500, 1]], rtol=1e-15, atol=0)
    assert torch.equal(grid.alphas_cumprod, torch.cat([levels[[999, 998, 500, 1, 0]], levels.new_ones(1)]))
    last = make_grid(levels, [1, 0], betas=betas, final=levels[0].item())
    assert last.betas[-1] == 0  # the last step does not change the level


def log_sigma(grid):
    return (1 / grid.now - 1).sqrt().log()


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_sigmas(rho):
    known, grid = (1 / LEVELS - 1).sqrt(), karras_grid(LEVELS, 15, rho=rho)
    sigma = (1 / grid.now - 1).sqrt()
    torch.testing.assert_close(sigma[[0, -1]], known[[-1, 0]], rtol=1e-9, atol=0)
    even = sigma ** (1 / rho)
    torch.testing.assert_close(even.diff(), even.diff()[:1].expand(14), rtol=1e-9, atol=0)
    assert (grid.timestep.diff() < 0).all() and abs(grid.timestep[0] - 999) < 1e-9 and abs(grid.timestep[-1]) < 1e-12


@pytest.mark.parametrize("name", [name for name in SIGMA_GRIDS if name != "align_your_steps_svd"])
def test_sigmas_that_end_with_noise(name):
    clean, noisy = (SIGMA_GRIDS[name](LEVELS, 6, final=final) for final in (1.0, LEVELS[0].item()))
    assert torch.equal(noisy.now, clean.now) and noisy.after[-1] == LEVELS[0] and clean.after[-1] == 1
    torch.testing.assert_close(noisy.betas, 1 - noisy.now / noisy.after, rtol=1e-12, atol=1e-12)


@for_many(60)
def test_timesteps_are_where_the_levels_are(choose):
    """In log sigma between two timesteps, for every spacing; the levels fall, and the last step ends in clean data."""
    name = choose.one_of([name for name in SIGMA_GRIDS if name != "align_your_steps_svd"], "name")
    steps = choose.integer(1, 60)
    grid = SIGMA_GRIDS[name](LEVELS, steps)
    assert len(grid) == steps and (grid.alphas_cumprod.diff() > 0).all() and grid.after[-1] == 1
    below = grid.timestep.long().clamp(max=998)
    expected = torch.lerp(LOG_SIGMA[below], LOG_SIGMA[below + 1], grid.timestep - below)
    inside = (log_sigma(grid) > LOG_SIGMA[0]) & (log_sigma(grid) < LOG_SIGMA[-1])
    torch.testing.assert_close(log_sigma(grid)[inside], expected[inside], rtol=0, atol=1e-9)
    torch.testing.assert_close(grid.betas, 1 - grid.now / grid.after, rtol=1e-12, atol=1e-15)


SIGMA = torch.linspace(1, 0, 50, dtype=torch.float64)


def test_align_your_steps_of_other_numbers():
    """Halfway between the published ones in log sigma; a video model's need its noise."""
    published = torch.tensor(ALIGN_YOUR_STEPS["sdxl"], dtype=torch.float64).log()
    between = torch.stack([published[:-1], (published[:-1] + published[1:]) / 2], 1).flatten()
    torch.testing.assert_close(log_sigma(align_your_steps_grid(LEVELS, 20, model="sdxl")), between)
    noisy = 1 / (1 + torch.logspace(-3, 3, 500, dtype=torch.float64) ** 2)
    video = torch.tensor(ALIGN_YOUR_STEPS["svd"][:-1:2], dtype=torch.float64)
    torch.testing.assert_close(log_sigma(align_your_steps_grid(noisy, 5, model="svd")), video.log())


def test_linear_quadratic_of_other_lengths():
    """A line of slope 0.025 / linear_steps, then a parabola, which a peer's test has for the default."""
    curve = linear_quadratic(10, 0.025, 4)
    assert torch.equal(linear_quadratic(9), linear_quadratic(9, 0.025, 4)) and linear_quadratic(1) == 1
    torch.testing.assert_close(-curve.diff()[:4], torch.full((4,), 0.025 / 4, dtype=torch.float64), rtol=1e-9, atol=0)
    second = torch.cat([curve, curve.new_zeros(1)])[4:].diff().diff()
    torch.testing.assert_close(second, second[:1].expand(len(second)), rtol=1e-7, atol=1e-12)


@for_many(50)
def test_shifts_follow_one_another(choose):
    """A shift multiplies sigma / (1 - sigma), so that two shifts are their product, and 1 / shift goes back."""
    one, other = (2.0 ** choose.integer(-6, 6) * choose.integer(1, 9) for _ in range(2))
    shifted = flow_shift(SIGMA, one)
    torch.testing.assert_close((shifted / (1 - shifted))[1:], one * (SIGMA / (1 - SIGMA))[1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(flow_shift(shifted, other), flow_shift(SIGMA, one * other), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(flow_shift(shifted, 1 / one), SIGMA, rtol=1e-10, atol=1e-14)


@for_many(50)
def test_grids(choose):
    options = {"terminal": choose.one_of([None, 0.1], "terminal"), "mu": choose.one_of([None, -0.5, 1.1], "mu")}
    options["curve"] = choose.one_of([None, "karras", "exponential", "beta"], "curve")
    steps = choose.integer(2, 40, "steps")
    sigma = linear_quadratic(steps) if choose.integer(0, 5) == 0 else flow_sigmas(steps, **options)
    grid = flow_grid(sigma, timesteps=500)
    signal, noise = grid.pairs
    torch.testing.assert_close(noise[:-1], sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(signal + noise, torch.ones_like(signal), rtol=1e-12, atol=0)
    assert noise[-1] == 0
    torch.testing.assert_close(grid.timestep, 500 * sigma, rtol=1e-15, atol=0)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize(
    "spacing, sigma",
    [
        ("sgm_uniform", lambda steps: torch.linspace(1, 1 / 50, steps + 1, dtype=torch.float64)[:-1]),
        ("linear_quadratic", linear_quadratic),
    ],
)
def test_spacings_of_a_flow(spacing, sigma, steps):
    """Their timesteps are those of the schedule that has level t / 50 at timestep t - 1, and lie in between."""
    process = GaussianDiffusion(50, "flow")
    grid = spaced_grid(process.alphas_cumprod, process.betas, steps, spacing, scale=process.schedule.scale)
    torch.testing.assert_close(grid.pairs[1][:-1], sigma(steps), rtol=1e-12, atol=0)
    torch.testing.assert_close(grid.pairs[0], 1 - grid.pairs[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grid.timestep, (50 * sigma(steps) - 1).clamp(min=0), rtol=1e-12, atol=1e-12)
