"""DDIM, its inversion, Euler and ancestral Euler, which all have rows of one form (`implicit`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.step_table import StepTable

__all__ = ["ancestral_sigma", "ddim", "ddim_inverse", "euler", "euler_ancestral", "implicit"]

ROUNDING = 1e-6  # the relative rounding error of levels from other libraries, which store them in float32


def implicit(
    grid: Grid | Jumps, prediction: str, sigma: Tensor, keep_eps: bool, direction: Tensor | None = None
) -> StepTable:
    """The rows prev = sqrt(a_s) x0 + direction eps + sigma z, with direction the factor of eps.

    a_s is alphas_cumprod where the step arrives. With keep_eps, eps is the noise that the model's output implies.
    Without keep_eps, it is the noise that leads from the clipped x0 to x_t.

    A direction of None stands for sqrt(1 - a_s - sigma^2), which gives prev the variance of its level: Song et al.
    2021, eq. (12). For a direction of None, sigma^2 must be at most 1 - a_s, up to rounding.
    """
    now, after = grid.now, grid.after
    if direction is None:
        direction = (1 - after - sigma**2).clamp(min=0).sqrt()
    if keep_eps:
        p, q = coefficients.eps(grid, prediction)
        c0, c1, c2, g1 = after.sqrt(), direction * p, direction * q, -direction * (1 - now).sqrt()
    else:
        c1 = direction / (1 - now).sqrt()
        c0, c2, g1 = after.sqrt() - c1 * now.sqrt(), None, None
    return coefficients.rows(grid, prediction, c0=c0, c1=c1, c2=c2, s=sigma, g1=g1)


@at_any_scale
def ddim(grid: Grid | Jumps, *, prediction: str = "eps", eta: float = 0.0, keep_eps: bool = True) -> StepTable:
    """DDIM: Song et al. 2021, eq. (12), with sigma from eq. (16).

    Args:
        grid: descending.
        prediction: see ddpm.
        eta: finite, >= 0. 0 is the deterministic sampler, 1 DDPM's posterior. Its largest value is at least 1 and
            depends on the grid: above it, a step would add more noise than the level where it arrives has.
        keep_eps: the eps of the step if x0 has been clipped. True keeps the model's eps (the tutorial, diffusers).
            False takes the eps that leads from the clipped x0 to x_t (guided-diffusion, lucidrains, diffusers with
            use_clipped_model_output).

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative, not finite, or so large that a step would add more noise than the level where it
            arrives has; a grid that goes up to more noise, unless `eta` is 0; or an unknown `prediction`.

    Examples:
        >>> table = ddim(grid, eta=0.5)  # for sampler= of a loop
    """
    sigma = coefficients.sigma(grid, eta)
    _check_noise(grid, sigma, eta)
    return implicit(grid, prediction, sigma, keep_eps)


def _check_noise(grid: Grid | Jumps, sigma: Tensor, eta: float) -> None:
    """Raises ValueError if sigma^2 > 1 - a_s: the step would add more noise than its level has at the end."""
    largest_factor = torch.where(sigma > 0, (1 - grid.after) / sigma**2, torch.inf)
    i = int(largest_factor.argmin())
    if largest_factor[i] < 1 - ROUNDING:
        largest_eta = math.floor(1e4 * eta * largest_factor[i].item() ** 0.5 + 1e-3) / 1e4
        raise ValueError(
            f"eta is {eta}, which in step {i}, from timestep {grid.timestep[i].item()}, asks for more noise than there "
            f"is where it arrives: expected at most {largest_eta}"
        )


@at_any_scale
def ddim_inverse(grid: Grid, *, prediction: str = "eps", keep_eps: bool = True) -> StepTable:
    """DDIM's map from noise to data in reverse: from data to the noise that leads there.

    Song et al. 2021, eq. (14) with the time reversed, as in Dhariwal & Nichol 2021, appendix F. Each row is an Euler
    step upwards, so the inversion is exact in the limit of short steps.

    Args:
        grid: ascending, as from make_grid(alphas_cumprod, timesteps from low to high, final=alphas_cumprod of the
            last).
        prediction, keep_eps: see ddim. "x_prev" is refused.

    Raises:
        ValueError: an unknown `prediction`, "x_prev", or a grid that does not ascend.

    Examples:
        >>> from ddpm_ext.tables.grid import make_grid
        >>> rising = make_grid(gd.alphas_cumprod, [0, 499], final=gd.alphas_cumprod[999].item())
        >>> ddim_inverse(rising).timestep.tolist()
        [0, 499]
    """
    if not coefficients.prediction_entry(prediction).any_step:
        raise ValueError(f"prediction is {prediction!r}, the mean of a step down, expected another for steps up")
    if not (grid.after < grid.now).all():
        raise ValueError("grid does not ascend in noise, expected alphas_cumprod to fall from step to step")
    return implicit(grid, prediction, torch.zeros_like(grid.now), keep_eps)


@at_any_scale
def euler(grid: Grid | Jumps, *, prediction: str = "eps") -> StepTable:
    """Euler's method for the probability flow in sigma: Karras et al. 2022, algorithm 1 without its second half.

    For variance-preserving samples, this is DDIM's row with eta 0 and the eps derived from the clipped x0. The samples
    of k-diffusion and diffusers are the same, divided by sqrt(alphas_cumprod).

    For the arguments and errors see ddim.

    Examples:
        >>> table = euler(grid, prediction="v")  # for sampler= of a loop
    """
    return ddim(grid, prediction=prediction, eta=0.0, keep_eps=False)


@at_any_scale
def euler_ancestral(grid: Grid | Jumps, *, prediction: str = "eps", eta: float = 1.0) -> StepTable:
    """k-diffusion's ancestral Euler: a step down to less noise than the next timestep's, then fresh noise up to it.

    This is DDIM's row with the same eta and the eps derived from the clipped x0, but no step adds more noise than the
    next timestep has, so that no eta is too large.

    For the arguments and the other errors see ddim.

    Examples:
        >>> euler_ancestral(grid).s.round(decimals=2).tolist()  # fresh noise in all steps but the last
        [0.96, 0.01, 0.0]
    """
    return implicit(grid, prediction, ancestral_sigma(grid, eta), keep_eps=False)


def ancestral_sigma(grid: Grid | Jumps, eta: float) -> Tensor:
    """The standard deviation of an ancestral step's noise: coefficients.sigma, but at most the next level's noise."""
    return torch.minimum(coefficients.sigma(grid, eta), (1 - grid.after).sqrt())
