"""The stochastic sampler of EDM: Heun's method with churn."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.levels import level_columns
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.heun import heun_steps
from ddpm_ext.tables.samplers.two_calls import jumps, merged, timesteps_of
from ddpm_ext.tables.sigma_grids import alphas_cumprod_of, sigmas_of
from ddpm_ext.tables.step_table import StepTable

__all__ = ["edm"]


@at_any_scale
def edm(
    grid: Grid,
    *,
    prediction: str = "eps",
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> StepTable:
    """Heun's method with churn: Karras et al. 2022, algorithm 2. The defaults are the paper's for ImageNet (table 5).

    Before a step whose sigma is in [s_tmin, s_tmax], fresh noise raises sigma to (1 + gamma) sigma, with gamma =
    min(s_churn / len(grid), sqrt(2) - 1). The model is called at this level, between the timesteps of the schedule, or
    at the schedule's last timestep if the level is above the schedule's greatest sigma. The last row of the previous
    step adds the noise. For the first step, an extra row without a call of the model does. Without churn the rows are
    heun's.

    Args:
        grid: descending. With churn, it needs a schedule or a timestep_of.
        prediction: see ddpm. "x_prev" is refused.
        s_churn: how much noise all steps together add, finite, >= 0.
        s_tmin, s_tmax: the range of sigmas, noise over signal, of the steps with churn, >= 0. s_tmax may be infinite.
        s_noise: a factor of the noise's standard deviation, finite, >= 0.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: an argument out of range, an unknown `prediction` or "x_prev", or churn on a grid that has neither a
            schedule nor a timestep_of.

    Examples:
        >>> from ddpm_ext.tables.sigma_grids import karras_grid
        >>> table = edm(karras_grid(gd.alphas_cumprod, 18), s_churn=30.0, s_tmin=0.01, s_tmax=1.0, s_noise=1.007)
    """
    coefficients.check_between(prediction)
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        checks.nonnegative(name, value)
    if s_tmax != math.inf:
        checks.nonnegative("s_tmax", s_tmax)
    sigma = sigmas_of(grid.now)
    churned = (sigma >= s_tmin) & (sigma <= s_tmax) & sigma.isfinite() & (s_churn > 0)
    start, timestep = grid.now.clone(), grid.timestep.clone()
    if churned.any():
        sigma_hat = sigma[churned] * (1 + min(s_churn / len(grid), math.sqrt(2) - 1))
        start[churned], timestep = alphas_cumprod_of(sigma_hat), timestep.double()
        timestep[churned] = timesteps_of(grid, sigma_hat)
    after = torch.cat([start[1:], grid.after[-1:]])
    ends = jumps(grid.timestep[1:], grid.now[1:], after[:-1])
    table = heun_steps(prediction, jumps(timestep, start, after), ends)
    if churned[0]:
        share = start[:1] / grid.now[:1]
        zero = torch.zeros_like(share)
        levels = level_columns(grid.now[:1], start[:1])
        noised = StepTable(grid.timestep[:1], zero, zero, c0=zero, c1=share.sqrt(), s=(1 - share).sqrt(), **levels)
        rows = torch.arange(1 + len(table), device="cpu")
        table = merged([(rows[:1], noised), (rows[1:], table)])
    return replace(table, s=s_noise * table.s)
