"""What somebody may do to a model's output before a step, so that the step is no row of numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _ramp(m: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, m.shape[-1], dtype=m.dtype)


# Each is a function of the model's output and of where the step lies in its loop, from 0 for the first to 1 for the
# last. None of them shows where a sample is a single number, or where a batch is the same in every run.
CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "divided by its standard deviation": lambda m, _: m / m.std(),
    "divided by its largest value": lambda m, _: m / m.abs().max(),
    "divided by its norm": lambda m, _: m / m.norm(),
    "divided by each sample's standard deviation": lambda m, _: m / m.std(dim=(1, 2, 3), keepdim=True),
    "divided by each sample's norm": lambda m, _: m / m.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
    "doubled where its mean is positive": lambda m, _: m * 2 if m.mean() > 0 else m,
    "doubled where its mean is negative": lambda m, _: m * 2 if m.mean() < 0 else m,
    "less each sample's mean": lambda m, _: m - m.mean(dim=(1, 2, 3), keepdim=True),
    "less each channel's mean": lambda m, _: m - m.mean(dim=(2, 3), keepdim=True),
    "less the mean of all": lambda m, _: m - m.mean(),
    "flipped": lambda m, _: m.flip(-1),
    "upside down": lambda m, _: m.flip(-2),
    "with its channels in reverse": lambda m, _: m.flip(1),
    "with its samples in reverse": lambda m, _: m.flip(0),
    "rolled": lambda m, _: m.roll(1, -1),
    "rolled by two": lambda m, _: m.roll(2, -1),
    "times the count of its numbers": lambda m, _: m * (m.numel() / 1000),
    "times its width": lambda m, _: m * (m.shape[-1] / 8),
    "times a ramp over the width": lambda m, _: m * _ramp(m),
    "with its first channel doubled": lambda m, _: torch.cat([2 * m[:, :1], m[:, 1:]], 1),
    "blurred": lambda m, _: torch.nn.functional.avg_pool2d(m, 3, 1, 1, count_include_pad=False),
    "bent": lambda m, _: m.tanh(),
    "clamped to three standard deviations": lambda m, _: m.clamp(-3 * m.std(), 3 * m.std()),
    "normalised in the first step": lambda m, place: m / m.std() if place == 0 else m,
    "normalised in the last step": lambda m, place: m / m.std() if place == 1 else m,
    "normalised in the middle": lambda m, place: m / m.std() if 0.4 < place < 0.6 else m,
}


def changed_before(cls: type, change: Callable[[Tensor, float], Tensor]) -> type:
    """A subclass whose step changes the model's output first."""
    own: Any = cls.step  # type: ignore[attr-defined]

    @functools.wraps(own)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = int((self.timesteps == timestep).nonzero()[0]) / max(len(self.timesteps) - 1, 1)
        return own(self, change(model_output, place), timestep, sample, *args, **kwargs)

    return type(cls.__name__, (cls,), {"step": step})
