"""The levels of a scheduler's timesteps: the factors of sample and noise in its add_noise or scale_noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.forward import forward_trial
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.tables import levels
from ddpm_ext.tables.grid import Grid, grid_of_levels
from ddpm_ext.tables.levels import Scale

NEAR = 1e-4  # the largest error of an invariant of SCALES


def _variance_preserving(signal: Tensor, noise: Tensor) -> Tensor:
    """The Scale of variance-preserving samples, which is 1 at all levels."""
    return torch.ones_like(signal)


# {scale of diffusers' samples: a function of signal and noise that is 1 at all levels of this scale}
SCALES: dict[Scale, Any] = {
    _variance_preserving: lambda signal, noise: signal**2 + noise**2,
    levels.sigma_space: lambda signal, noise: signal,
    levels.flow: lambda signal, noise: signal + noise,
}


@dataclass(frozen=True)
class LoopLevels:
    """The levels at which the steps of a loop begin. The last step ends at clean samples.

    Attributes:
        timesteps: int64 or float64, (steps,).
        signal, noise: float64, (steps,).
        scale: the scale of the samples.
        set_timesteps_options: `sigmas` and `mu`, as far as the pipeline passed them to set_timesteps.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    scale: Scale
    set_timesteps_options: dict[str, Any]

    def __len__(self) -> int:
        return len(self.timesteps)

    def grid(self, rows: Sequence[int] | slice = slice(None)) -> Grid:
        """The grid of the steps with these indices, for samplers. It ends at clean samples."""
        signal = torch.cat([self.signal[rows], self.signal.new_ones(1)])
        noise = torch.cat([self.noise[rows], self.noise.new_zeros(1)])
        return grid_of_levels(self.timesteps[rows], signal, noise, scale=self.scale)


def levels_of(scheduler: Any, set_timesteps_options: dict[str, Any]) -> LoopLevels:
    """The levels of the loop that a scheduler has begun. Raises ValueError if these are unknown or fit none of SCALES.

    Args:
        set_timesteps_options: see LoopLevels.
    """
    for index in ("_begin_index", "_step_index"):  # if one is set, add_noise reads it in place of the timesteps
        if index in vars(scheduler):
            setattr(scheduler, index, None)
    times = scheduler.timesteps.cpu().unique_consecutive()
    method = "add_noise" if hasattr(scheduler, "add_noise") else "scale_noise"
    try:
        weights = forward_trial(scheduler, method, times)
    except (Fallback, AttributeError):
        raise ValueError(f"the levels of {type(scheduler).__name__} can't be read from its {method}") from None
    signal, noise = weights.double().unbind(1)
    for scale, invariant in SCALES.items():
        if ((invariant(signal, noise) - 1).abs() < NEAR).all():
            times = times.double() if times.is_floating_point() else times.long()
            return LoopLevels(times, signal, noise, scale, set_timesteps_options)
    raise ValueError(
        f"the levels of {type(scheduler).__name__} are neither variance-preserving, nor those of x0 + sigma eps or "
        "(1 - sigma) x0 + sigma eps"
    )
