"""Classifier-free guidance, as an option of the sampling loop."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks


@dataclass(frozen=True)
class Guidance:
    """Replaces the model's output m by u + scale (m - u), with u the unconditional output (Ho & Salimans 2022, eq. 6).

    Args:
        scale: diffusers' guidance_scale, where 1 is no guidance. The paper's scale is lower by 1.
        unconditional: unconditional(x_t, t) -> u, of x_t's shape. With None, the model gets the batch twice, in a
            tensor (2 * batch, ...), and returns u in the first half and m in the second, as in diffusers. Tensors in
            model_kwargs that have a row for each sample must then have 2 * batch rows, too; in steps without guidance,
            the model gets their second half.
        rescale: phi of Lin et al. 2024, section 3.4, from 0 to 1. Guidance increases the standard deviation of the
            output, and this share of the increase is undone. The paper recommends 0.7.
        interval: (low, high), the range of timesteps with guidance, both included (Kynkäänniemi et al. 2024). At other
            timesteps the model gets the batch once. None includes all timesteps.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> guidance = Guidance(3.0, unconditional=lambda x, t: 0.05 * x, interval=(200, 800))
        >>> samples = GaussianDiffusion(1000).sample(model, 8, steps=20, guidance=guidance, progress=False)
    """

    scale: float
    unconditional: Callable[[Tensor, Tensor], Any] | None = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        checks.finite("guidance scale", self.scale)
        if self.unconditional is not None and not callable(self.unconditional):
            raise TypeError(f"unconditional is {self.unconditional!r}, expected a function of x_t and t")
        if not 0 <= checks.finite("guidance rescale", self.rescale) <= 1:
            raise ValueError(f"guidance rescale is {self.rescale}, expected 0 <= rescale <= 1")
        if self.interval is not None:
            if not isinstance(self.interval, tuple | list) or len(self.interval) != 2:
                raise TypeError(f"guidance interval is {self.interval!r}, expected (low, high)")
            low, high = (checks.finite("guidance interval", end) for end in self.interval)
            if low > high:
                raise ValueError(f"guidance interval is {self.interval}, expected low <= high")

    def guides(self, timestep: Tensor) -> Tensor:
        """For each timestep, whether there is guidance, bool of timestep's shape. It is False outside the interval."""
        if self.interval is None:
            return torch.ones(timestep.shape, dtype=torch.bool, device="cpu")
        low, high = self.interval
        return (timestep >= low) & (timestep <= high)


def as_guidance(guidance: Guidance | float | None) -> Guidance | None:
    """Converts the option `guidance` of p_sample_loop to a Guidance or None. A number is the scale."""
    if guidance is None or isinstance(guidance, Guidance):
        return guidance
    if isinstance(guidance, numbers.Real):
        return Guidance(guidance)
    raise TypeError(f"guidance is {guidance!r}, expected a Guidance or its scale")
