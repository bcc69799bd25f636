"""Singlestep solvers of second order: they call the model a second time in the middle of each step."""

from __future__ import annotations

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.ddim import ancestral_sigma
from ddpm_ext.tables.samplers.two_calls import Correction, jumps, timesteps_of, two_calls
from ddpm_ext.tables.sigma_grids import alphas_cumprod_of, sigmas_of
from ddpm_ext.tables.step_table import StepTable

__all__ = ["dpm_2", "dpm_2_ancestral", "dpmpp_2s"]


@at_any_scale
def dpmpp_2s(grid: Grid, *, prediction: str = "eps", eta: float = 0.0) -> StepTable:
    """DPM-Solver++(2S): Lu et al. 2022b, algorithm 1 with r = 1/2; ancestral for eta above 0, like k-diffusion's.

    A step is two rows. The first row is an Euler step to the middle in log sigma. There the model is called a second
    time, at a timestep that may lie between those of the schedule. The second row takes the whole step with the x0 of
    the middle. A step is one Euler row if it starts from pure noise, or if it arrives at a level whose noise is all
    fresh, or at clean data. For eta above 0, a step goes down to less noise than the level where it arrives and adds
    fresh noise, like euler_ancestral.

    Args:
        grid: descending, with a schedule or a timestep_of.
        prediction: see ddpm. "x_prev" is refused.
        eta: finite, >= 0. 0 is the probability flow, 1 the ancestral sampler.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative or not finite, an unknown `prediction` or "x_prev", or a grid that has
            neither a schedule nor a timestep_of.

    Examples:
        >>> table = dpmpp_2s(grid, eta=1.0)  # for sampler= of a loop
    """
    return _midpoint(grid, prediction, eta, by_eps=False)


@at_any_scale
def dpm_2(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """DPM-Solver-2: Lu et al. 2022, algorithm 1 with r = 1/2, like k-diffusion's dpm_2 and diffusers' KDPM2.

    Like dpmpp_2s without eta, but the second row takes the step with the eps of the middle.

    For the arguments and errors see dpmpp_2s.

    Examples:
        >>> dpm_2(grid).timestep.round().tolist()  # a step's second call lies between the levels of the grid
        [999.0, 787.0, 499.0, 53.0, 0.0]
    """
    return _midpoint(grid, prediction, 0.0, by_eps=True)


@at_any_scale
def dpm_2_ancestral(grid: Grid, *, prediction: str = "eps", eta: float = 1.0) -> StepTable:
    """DPM-Solver-2 with fresh noise: dpm_2's step goes down to less noise than the next timestep's, as in k-diffusion.

    For the arguments and errors see dpmpp_2s.

    Examples:
        >>> table = dpm_2_ancestral(grid, eta=0.5)  # for sampler= of a loop
    """
    return _midpoint(grid, prediction, eta, by_eps=True)


def _midpoint(grid: Grid, prediction: str, eta: float, by_eps: bool) -> StepTable:
    """The rows of steps through a midpoint.

    With y = x / sqrt(alphas_cumprod), a step leads from sigma by way of r sigma to r^2 sigma:

        y_m = r y + (1 - r) x0
        y_s = r^2 y + (1 - r^2) x0_m             with the x0 of the middle, or
        y_s = y + (r^2 - 1) sigma eps_m          with the eps of the middle, (y_m - x0_m) / (r sigma), if by_eps

    x0 is the first row's, and x0_m that of the model's call in the middle. The second row computes y from y_m and x0.
    """
    coefficients.check_between(prediction)
    s = ancestral_sigma(grid, eta)  # at most sqrt(1 - a_s), so that the clamp below removes only rounding errors
    sigma, sigma_down = sigmas_of(grid.now), (1 - grid.after - s**2).clamp(min=0).sqrt() / grid.after.sqrt()
    twice = (grid.now > 0) & (s < (1 - grid.after).sqrt())
    r, after = (sigma_down / sigma)[twice].sqrt(), grid.after[twice]
    between = sigma[twice] * r
    calls = jumps(timesteps_of(grid, between), alphas_cumprod_of(between), after)
    x0_factor, first_factor = ((1 - r**2) / r, (1 - r) / r) if by_eps else (1 - r**2, (1 - r) * r)
    correction = Correction(calls, x0_factor, r, -first_factor)
    return two_calls(prediction, Jumps(grid.timestep, grid.now, grid.after, grid.alphas), s, twice, correction)
