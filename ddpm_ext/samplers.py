"""Samplers: each a way to fill the rows of a StepTable. A loop takes them as they are, and so does one kernel.

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample

All have one signature, sampler(grid, *, prediction="eps", ...) -> StepTable; spacing.py makes grids. Below, a_t stands
for alphas_cumprod where a step starts and a_s for where it arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_ext import checks, tables
from ddpm_ext.spacing import Grid
from ddpm_ext.step_table import StepTable

__all__ = ["SAMPLERS", "ddim", "ddim_inverse", "ddpm", "euler", "euler_ancestral"]

PREDICTIONS = (*tables.PREDICTIONS, "x_prev")
VARIANCES = ("fixed_small", "fixed_large")


def _posterior(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Of q(x_s | x_t, x_0): the weights of x_0 and x_t in its mean, and its variance (Ho et al. 2020, eq. 7)."""
    now, after, betas = grid.now, grid.after, grid.betas
    return (
        betas * after.sqrt() / (1 - now),
        (1 - after) * (1 - betas).sqrt() / (1 - now),
        betas * (1 - after) / (1 - now),
    )


def _x0(grid: Grid, prediction: str) -> tuple[Tensor, Tensor]:
    """a, b of x0 = a x + b m."""
    checks.one_of("prediction", prediction, PREDICTIONS)
    if prediction != "x_prev":
        return tables.prediction_coefficients(grid.now, prediction)
    of_x0, of_x, _ = _posterior(grid)  # m is the posterior's mean
    return -of_x / of_x0, 1 / of_x0


def _eps(grid: Grid, prediction: str) -> tuple[Tensor, Tensor]:
    """p, q of eps = p x + q m, the noise that an unclipped prediction implies."""
    now = grid.now
    if prediction == "eps":
        return torch.zeros_like(now), torch.ones_like(now)
    if prediction == "v":
        return (1 - now).sqrt(), now.sqrt()
    a, b = _x0(grid, prediction)
    return (1 - now.sqrt() * a) / (1 - now).sqrt(), -now.sqrt() * b / (1 - now).sqrt()


def check_eta(eta: object) -> float:
    if isinstance(eta, bool) or not isinstance(eta, int | float):
        raise TypeError(f"eta is {eta!r}, expected a float")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is {eta}, expected a finite eta >= 0")
    return float(eta)


def _sigma(grid: Grid, eta: float) -> Tensor:
    """eta times the posterior's standard deviation: Song et al. 2021, eq. (16)."""
    return check_eta(eta) * _posterior(grid)[2].clamp(min=0).sqrt()


def _implicit(grid: Grid, prediction: str, sigma: Tensor, keep_eps: bool) -> StepTable:
    """prev = sqrt(a_s) x0 + sqrt(1 - a_s - sigma^2) eps + sigma z: Song et al. 2021, eq. (12)."""
    now, after = grid.now, grid.after
    direction = (1 - after - sigma**2).clamp(min=0).sqrt()
    a, b = _x0(grid, prediction)
    if keep_eps:
        p, q = _eps(grid, prediction)
        c0, c1, c2 = after.sqrt(), direction * p, direction * q
    else:
        c1 = direction / (1 - now).sqrt()
        c0, c2 = after.sqrt() - c1 * now.sqrt(), torch.zeros_like(a)
    return StepTable(timestep=grid.timestep, a=a, b=b, c0=c0, c1=c1, c2=c2, s=sigma)


def ddpm(grid: Grid, *, prediction: str = "eps", variance: str = "fixed_small") -> StepTable:
    """Ancestral sampling, a draw from the posterior q(x_s | x_t, x_0): Ho et al. 2020, eq. (6), (7) and algorithm 2.

    Over a subset of the timesteps with the betas of Nichol & Dhariwal 2021, section 4: beta = 1 - a_t / a_s.

    Args:
        grid: descending.
        prediction: what the model predicts, "eps", "x0", "v" (Salimans & Ho 2022) or "x_prev" (the posterior's mean).
        variance: "fixed_small", the posterior's, at least 1e-20; or "fixed_large", beta. The last step adds none.

    Raises:
        ValueError: an unknown name.
    """
    checks.one_of("variance", variance, VARIANCES)
    of_x0, of_x, posterior_variance = _posterior(grid)
    a, b = _x0(grid, prediction)
    s = (posterior_variance.clamp(min=1e-20) if variance == "fixed_small" else grid.betas).sqrt()
    s[-1] = 0
    return StepTable(timestep=grid.timestep, a=a, b=b, c0=of_x0, c1=of_x, c2=torch.zeros_like(a), s=s)


def ddim(grid: Grid, *, prediction: str = "eps", eta: float = 0.0, keep_eps: bool = True) -> StepTable:
    """Song et al. 2021, eq. (12), with sigma from eq. (16).

    Args:
        grid: descending.
        prediction: as ddpm's.
        eta: 0 for the deterministic sampler, 1 for DDPM's posterior; finite, >= 0.
        keep_eps: whether, after a clip of x0, the step goes on with the noise that the model predicted (the tutorial,
            diffusers), or with the noise that leads from the clipped x0 to x_t (guided-diffusion, lucidrains; diffusers
            with use_clipped_model_output).

    Raises:
        TypeError, ValueError: `eta` is no finite number >= 0, or an unknown `prediction`.
    """
    return _implicit(grid, prediction, _sigma(grid, eta), keep_eps)


def ddim_inverse(grid: Grid, *, prediction: str = "eps", keep_eps: bool = True) -> StepTable:
    """DDIM's map from noise to data, run backwards: from data to the noise that leads there. Song et al. 2021, eq. (14)
    with the time reversed, as in Dhariwal & Nichol 2021, appendix F: an Euler step up, so exact as steps go to zero.

    Args:
        grid: ascending: make_grid(alphas_cumprod, timesteps from low to high, final=alphas_cumprod of the last).
        prediction, keep_eps: as ddim's.

    Raises:
        ValueError: an unknown `prediction`, or a grid that does not ascend.
    """
    if not (grid.after < grid.now).all():
        raise ValueError("grid does not ascend in noise, expected alphas_cumprod to fall from step to step")
    return _implicit(grid, prediction, torch.zeros_like(grid.now), keep_eps)


def euler(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """Euler's method for the probability flow in sigma: Karras et al. 2022, algorithm 1 without its second half.

    On samples of unit variance, which a loop here holds, that is DDIM's row with eta 0 and the noise rederived from the
    clipped x0; k-diffusion and diffusers hold the same sample divided by sqrt(alphas_cumprod).

    Args, raises: as ddim's.
    """
    return ddim(grid, prediction=prediction, eta=0.0, keep_eps=False)


def euler_ancestral(grid: Grid, *, prediction: str = "eps", eta: float = 1.0) -> StepTable:
    """k-diffusion's ancestral Euler: down to less noise than asked, and back up by adding some.

    That is DDIM's row again, with its eta and the noise rederived; only that no step adds more than it ends with.

    Args, raises: as ddim's.
    """
    sigma = torch.minimum(_sigma(grid, eta), (1 - grid.after).sqrt())
    return _implicit(grid, prediction, sigma, keep_eps=False)


SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
}
WITH_ETA = ("ddim", "euler_ancestral")
