"""Levels between a schedule's timesteps, as sigmas."""

import pytest
import torch
from support.choices import for_many

from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import (
    ALIGN_YOUR_STEPS,
    SIGMA_GRIDS,
    align_your_steps_grid,
    beta_sigmas_grid,
    karras_grid,
    linear_quadratic,
    log_snr_grid,
    sgm_uniform_grid,
)

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
LOG_SIGMA = (1 / LEVELS - 1).sqrt().log()


def log_sigma(grid):
    return (1 / grid.now - 1).sqrt().log()


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_sigmas(rho):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", use_karras_sigmas=True)
    known = (1 / LEVELS - 1).sqrt()
    grid = karras_grid(LEVELS, 15, rho=rho)
    sigma = (1 / grid.now - 1).sqrt()
    if rho == 7:  # the only rho that diffusers has, in float32
        scheduler.set_timesteps(15)
        torch.testing.assert_close(sigma.float(), scheduler.sigmas[:-1], rtol=1e-4, atol=0)
        torch.testing.assert_close(grid.timestep.float(), scheduler.timesteps, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(sigma[[0, -1]], known[[-1, 0]], rtol=1e-9, atol=0)
    even = sigma ** (1 / rho)
    torch.testing.assert_close(even.diff(), even.diff()[:1].expand(14), rtol=1e-9, atol=0)
    assert (grid.timestep.diff() < 0).all()
    assert abs(grid.timestep[0] - 999) < 1e-9
    assert abs(grid.timestep[-1]) < 1e-12


def test_log_snr_is_even_in_log_sigma():
    grid = log_snr_grid(LEVELS, 20)
    log_sigma = (1 / grid.now - 1).sqrt().log()
    torch.testing.assert_close(log_sigma.diff(), log_sigma.diff()[:1].expand(19), rtol=1e-9, atol=0)
    whole = grid.timestep.round().long()
    assert ((1 / LEVELS - 1).sqrt().log()[whole] - log_sigma).abs().max() < 0.1  # half a timestep, at low noise


@for_many(60)
def test_timesteps_are_where_the_levels_are(choose):
    """In log sigma between two timesteps, for every spacing; the levels fall, and the last step ends in clean data."""
    name = choose.one_of([name for name in SIGMA_GRIDS if name != "align_your_steps_svd"], "name")
    steps = choose.integer(1, 60)
    grid = SIGMA_GRIDS[name](LEVELS, steps)
    assert len(grid) == steps
    assert (grid.alphas_cumprod.diff() > 0).all()
    assert grid.after[-1] == 1
    below = grid.timestep.long().clamp(max=998)
    expected = torch.lerp(LOG_SIGMA[below], LOG_SIGMA[below + 1], grid.timestep - below)
    inside = (log_sigma(grid) > LOG_SIGMA[0]) & (log_sigma(grid) < LOG_SIGMA[-1])
    torch.testing.assert_close(log_sigma(grid)[inside], expected[inside], rtol=0, atol=1e-9)
    torch.testing.assert_close(grid.betas, 1 - grid.now / grid.after, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 999])
def test_sgm_uniform_is_even_in_the_timestep(steps):
    expected = 999 * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    torch.testing.assert_close(sgm_uniform_grid(LEVELS, steps).timestep, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps, linear_steps", [(1, None), (2, None), (9, None), (64, None), (10, 4), (10, 10)])
def test_linear_quadratic(steps, linear_steps):
    """A line of slope 0.025 / linear_steps, then a parabola that begins with it and would end at 0."""
    linear = max(1, steps // 2) if linear_steps is None else linear_steps
    curve = linear_quadratic(steps, 0.025, linear_steps)
    assert curve[0] == 1
    falls = -curve.diff()
    torch.testing.assert_close(falls[:linear], torch.full_like(falls[:linear], 0.025 / linear), rtol=1e-9, atol=0)
    second = torch.cat([curve, curve.new_zeros(1)])[linear:].diff().diff()
    torch.testing.assert_close(second, second[:1].expand(len(second)), rtol=1e-7, atol=1e-12)
    if steps - linear > 1:  # the parabola's slope where it begins, by its first step and its second difference
        begins = curve[linear + 1] - curve[linear] - second[0] / 2
        torch.testing.assert_close(begins, torch.tensor(-0.025 / linear).double(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_align_your_steps(model):
    """The published ones, and halfway between them in log sigma for twice as many steps."""
    published = torch.tensor(ALIGN_YOUR_STEPS[model], dtype=torch.float64).log()
    torch.testing.assert_close(log_sigma(align_your_steps_grid(LEVELS, 10, model=model)), published[:-1])
    between = torch.stack([published[:-1], (published[:-1] + published[1:]) / 2], 1).flatten()
    torch.testing.assert_close(log_sigma(align_your_steps_grid(LEVELS, 20, model=model)), between)


def test_align_your_steps_of_a_video_model_needs_its_noise():
    sigma = torch.logspace(-3, 3, 500, dtype=torch.float64)
    grid = align_your_steps_grid(1 / (1 + sigma**2), 5, model="svd")
    torch.testing.assert_close((1 / grid.now - 1).sqrt(), torch.tensor(ALIGN_YOUR_STEPS["svd"][:-1:2]).double())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: karras_grid(LEVELS, 0), ValueError, "steps is 0"),
        (lambda: karras_grid(LEVELS, 5, rho=0), ValueError, "rho is 0"),
        (lambda: log_snr_grid(LEVELS.flip(0), 5), ValueError, "does not fall"),
        (lambda: karras_grid(torch.tensor([0.5, 0.0]), 5), ValueError, "reaches 0 or 1"),
        (lambda: beta_sigmas_grid(LEVELS, 5, alpha=0), ValueError, "alpha is 0, expected 0 < alpha <= 10"),
        (lambda: align_your_steps_grid(LEVELS, 5, model="sd3"), ValueError, "model is 'sd3', expected 'sd15' or"),
        (lambda: align_your_steps_grid(LEVELS, 5, model="svd"), ValueError, "reaches a sigma of 14.61, expected 700"),
    ],
)
def test_bad_sigma_grids(make, error, message):
    with pytest.raises(error, match=message):
        make()
