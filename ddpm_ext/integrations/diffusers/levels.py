"""The levels that a scheduler of diffusers gives its timesteps, told by its own add_noise or scale_noise."""

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

NEAR = 1e-4


def _unit(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.ones_like(signal)


# The scales of diffusers' samples, by what is 1 at all their levels.
SCALES: dict[Scale, Any] = {
    _unit: lambda signal, noise: signal**2 + noise**2,
    levels.sigma_space: lambda signal, noise: signal,
    levels.flow: lambda signal, noise: signal + noise,
}


@dataclass(frozen=True)
class OwnLevels:
    """A loop's levels. The last step arrives at clean samples.

    timesteps: int64 or float64 (steps,). signal, noise: float64 (steps,). scale: of all. given: what the pipeline gave
    to set_timesteps beside the number of steps.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    scale: Scale
    given: dict[str, Any]

    def __len__(self) -> int:
        return len(self.timesteps)

    def grid(self, rows: Sequence[int] | slice = slice(None)) -> Grid:
        """These steps, as samplers take them."""
        signal = torch.cat([self.signal[rows], self.signal.new_ones(1)])
        noise = torch.cat([self.noise[rows], self.noise.new_zeros(1)])
        return grid_of_levels(self.timesteps[rows], signal, noise, scale=self.scale)


def levels_of(scheduler: Any, given: dict[str, Any]) -> OwnLevels:
    """The levels of the loop that a scheduler has begun. Raises ValueError where it does not tell them."""
    for index in ("_begin_index", "_step_index"):  # where one is set, it counts in place of every timestep
        if index in vars(scheduler):
            setattr(scheduler, index, None)
    times = scheduler.timesteps.cpu().unique_consecutive()
    method = "add_noise" if hasattr(scheduler, "add_noise") else "scale_noise"
    try:
        weights = forward_trial(scheduler, method, times)
    except (Fallback, AttributeError):
        raise ValueError(f"{type(scheduler).__name__} does not tell its levels by {method}") from None
    signal, noise = weights.double().unbind(1)
    for scale, one in SCALES.items():
        if ((one(signal, noise) - 1).abs() < NEAR).all():
            times = times.double() if times.is_floating_point() else times.long()
            return OwnLevels(times, signal, noise, scale, given)
    raise ValueError(f"the samples of {type(scheduler).__name__} are none whose scale is known here")
