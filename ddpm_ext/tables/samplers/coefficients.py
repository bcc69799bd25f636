"""Coefficients that several samplers compute their rows from: float64 (rows,), for the steps of a grid.

a_t stands for alphas_cumprod where a step starts (grid.now) and a_s for alphas_cumprod where it arrives (grid.after).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.predictions import HUGE, PREDICTIONS, Levels, Prediction
from ddpm_ext.tables.samplers.eta import check_eta
from ddpm_ext.tables.step_table import StepTable


def posterior(grid: Grid | Jumps) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_s | x_t, x_0): the weights of x_0 and x_t in its mean, and its variance (Ho et al. 2020, eq. 7)."""
    now, after, betas = grid.now, grid.after, grid.betas
    return (
        betas * after.sqrt() / (1 - now),
        (1 - after) * grid.alphas.sqrt() / (1 - now),
        betas * (1 - after) / (1 - now),
    )


def posterior_variance(grid: Grid | Jumps) -> Tensor:
    """The variance of q(x_s | x_t, x_0).

    Raises:
        ValueError: a step goes up to more noise, for which the posterior is not defined.
    """
    goes_up = grid.after < grid.now
    if goes_up.any():
        i = int(goes_up.byte().argmax())
        raise ValueError(
            f"grid's step {i}, from timestep {grid.timestep[i].item()}, goes up to more noise, expected steps down "
            "for a sampler that adds the posterior's noise"
        )
    return posterior(grid)[2].clamp(min=0)  # between nearly equal levels, rounding may make it negative


def half_log_snr(grid: Grid) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio at each level, (rows + 1,): lambda of Lu et al. 2022.

    It is infinite at pure noise and at clean data.
    """
    return (grid.alphas_cumprod.log() - torch.log1p(-grid.alphas_cumprod)) / 2


def _levels(grid: Grid | Jumps) -> Levels:
    x0_factor, x_factor, _ = posterior(grid)
    return Levels(grid.now, x0_factor, x_factor)


def prediction_entry(name: str) -> Prediction:
    """The entry of PREDICTIONS with this name. Raises ValueError for an unknown name."""
    return PREDICTIONS[checks.one_of("prediction", name, PREDICTIONS)]


def check_between(prediction: str) -> None:
    """Raises ValueError unless a model of this prediction can be called between the timesteps of its schedule."""
    if not prediction_entry(prediction).any_step:
        raise ValueError(
            f"prediction is {prediction!r}, the mean of a step of the schedule, expected another for a sampler that "
            "calls the model between its timesteps"
        )


def x0(grid: Grid | Jumps, prediction: str) -> tuple[Tensor, Tensor]:
    """a, b of x0 = a x + b m, the clean sample that the model's output m implies before the clip."""
    return prediction_entry(prediction).x0(_levels(grid))


def eps(grid: Grid | Jumps, prediction: str) -> tuple[Tensor, Tensor]:
    """p, q of eps = p x + q m, the noise that the model's output m implies without a clip of x0."""
    return prediction_entry(prediction).eps(_levels(grid))


def score(grid: Grid | Jumps) -> Tensor:
    """g0 for a sampler that replaces eps by eps - sqrt(1 - a_t) g, with g a classifier's gradient.

    This is (1 - a_t) / sqrt(a_t), but 0 where almost no signal is left, so that every row is finite.
    """
    root = grid.now.sqrt()
    return torch.where(root < 1 / HUGE, 0.0, (1 - grid.now) / root)


def rows(grid: Grid | Jumps, prediction: str, **columns: Tensor | None) -> StepTable:
    """The table of the grid's steps with these columns.

    Timesteps, a and b come from the grid and the prediction. Unless `columns` has others, g0 comes from `score` and the
    levels from the grid.
    """
    a, b = x0(grid, prediction)
    return StepTable(grid.timestep, a, b, **{"g0": score(grid), **grid.levels, **columns})


def sigma(grid: Grid | Jumps, eta: float) -> Tensor:
    """eta times the posterior's standard deviation: Song et al. 2021, eq. (16).

    Raises:
        TypeError, ValueError: `eta` is not a finite number >= 0; the errors of posterior_variance, unless `eta` is 0.
    """
    eta = check_eta(eta)
    return eta * posterior_variance(grid).sqrt() if eta else torch.zeros_like(grid.now)
