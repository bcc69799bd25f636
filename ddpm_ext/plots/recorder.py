"""What happens along a sampling loop: x_t and the predicted x_0 at some of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddpm_ext.loop.loop import Record

__all__ = ["Recorder"]

Array = npt.NDArray[np.float32]


@dataclass
class Recorder:
    """Stands in the model's place in a loop with x0=True, and its `keep` is the callback there: keeps x_t and the x_0
    that the loop predicts from it, of every k-th call and of the last.

    `every`: k, at least 1. `steps`: how many calls the loop will make. `samples`: how many of the batch are kept.
    Afterwards `t`, `x_t` and `x_0` hold one entry a kept call: arrays (samples, channels, height, width) float32.
    """

    model: Callable[[Tensor, Tensor], Any]
    every: int
    steps: int
    samples: int
    t: list[int | float] = field(default_factory=list)
    x_t: list[Array] = field(default_factory=list)
    x_0: list[Array] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, expected at least 1")

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        if self.calls % self.every == 0 or self.calls == self.steps - 1:
            self.t.append(t[0].item())
            self.x_t.append(self._kept(x))
        self.calls += 1
        return self.model(x, t)

    def keep(self, record: Record) -> None:
        """The x_0 that belongs to the last x_t, if that was kept."""
        if len(self.x_0) < len(self.x_t):
            assert record.x0 is not None
            self.x_0.append(self._kept(record.x0))

    def _kept(self, x: Tensor) -> Array:
        return x[: self.samples].float().cpu().numpy().copy()

    def labels(self) -> list[str]:
        """ "t = 999" and so on, one a kept call"""
        return [f"t = {moment:.4g}" for moment in self.t]
