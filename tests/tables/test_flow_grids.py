"""Sigmas of flows: shifted, stretched, along a curve."""

import math

import pytest
import torch
from support.choices import for_many

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.flow_grids import (
    flow_grid,
    flow_shift,
    flow_sigmas,
    flow_spaced_grid,
    resolution_mu,
    stretched,
)
from ddpm_ext.tables.sigma_grids import linear_quadratic
from ddpm_ext.tables.spacing import spaced_grid

SIGMA = torch.linspace(1, 0, 50, dtype=torch.float64)


@for_many(50)
def test_shifts_follow_one_another(choose):
    """A shift multiplies sigma / (1 - sigma), so that two shifts are their product, and 1 / shift goes back."""
    one, other = (2.0 ** choose.integer(-6, 6) * choose.integer(1, 9) for _ in range(2))
    shifted = flow_shift(SIGMA, one)
    torch.testing.assert_close((shifted / (1 - shifted))[1:], one * (SIGMA / (1 - SIGMA))[1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(flow_shift(shifted, other), flow_shift(SIGMA, one * other), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(flow_shift(shifted, 1 / one), SIGMA, rtol=1e-10, atol=1e-14)


def test_stretched_ends_at_the_terminal():
    sigma = flow_sigmas(7, mu=0.9)
    ends = flow_sigmas(7, mu=0.9, terminal=0.1)
    assert ends[0] == 1
    assert ends[-1].item() == pytest.approx(0.1, rel=1e-12)
    torch.testing.assert_close((1 - ends) / (1 - ends[-1]), (1 - sigma) / (1 - sigma[-1]), rtol=1e-12, atol=0)


def test_mu_of_a_resolution():
    """The two points of Flux's line, and one beyond."""
    assert resolution_mu(256) == 0.5
    assert resolution_mu(4096) == 1.15
    assert resolution_mu(7936) == pytest.approx(1.8)
    torch.testing.assert_close(flow_sigmas(9, mu=resolution_mu(4096)), flow_sigmas(9, shift=math.exp(1.15)))


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
    process = GaussianDiffusion(50, "flow").process
    grid = spaced_grid(process.alphas_cumprod, process.betas, steps, spacing, scale=process.schedule.scale)
    torch.testing.assert_close(grid.pairs[1][:-1], sigma(steps), rtol=1e-12, atol=0)
    torch.testing.assert_close(grid.pairs[0], 1 - grid.pairs[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grid.timestep, (50 * sigma(steps) - 1).clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: flow_shift(SIGMA, 0), ValueError, "shift is 0, expected shift > 0"),
        (lambda: flow_sigmas(0), ValueError, "steps is 0"),
        (lambda: flow_sigmas(5, least=0), ValueError, "least is 0, expected 0 < least <= 1"),
        (lambda: flow_sigmas(5, shift=3.0, mu=1.0), ValueError, "mu is 1.0 beside shift 3.0"),
        (lambda: flow_sigmas(5, mu="1"), TypeError, "mu is '1', expected a number"),
        (lambda: flow_sigmas(5, terminal=1.0), ValueError, "terminal is 1.0, expected 0 < terminal < 1"),
        (lambda: flow_sigmas(1, terminal=0.1), ValueError, "sigma ends at 1.0, expected less than 1"),
        (lambda: flow_sigmas(5, curve="lu"), ValueError, "curve is 'lu', expected 'karras' or 'exponential' or 'beta'"),
        (lambda: flow_grid(torch.tensor([0.5, 0.7])), ValueError, r"sigma and final are \[0.5, 0.6"),
        (lambda: flow_grid(torch.tensor([1.5, 0.7])), ValueError, "expected falling numbers from 1 to 0"),
        (lambda: flow_grid(torch.tensor([0.5]), final=-0.1), ValueError, "expected falling numbers from 1 to 0"),
        (lambda: flow_grid(torch.tensor([1, 0])), TypeError, "sigma has dtype torch.int64"),
        (lambda: flow_grid(torch.ones(2, 2)), ValueError, r"sigma has shape \(2, 2\)"),
        (lambda: stretched([1.0], 0.5), TypeError, "sigma is a list"),
        (lambda: resolution_mu(0), ValueError, "tokens is 0"),
        (
            lambda: flow_spaced_grid(SIGMA, 3, "log_snr"),
            ValueError,
            "spacing is 'log_snr', expected for a flow 'karras'",
        ),
        (lambda: flow_spaced_grid(SIGMA, 0, "karras"), ValueError, "steps is 0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
