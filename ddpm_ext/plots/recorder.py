"""Records x_t and the predicted x_0 at some steps of a sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddpm_ext.loop.options import Record

Array = npt.NDArray[np.float32]


@dataclass
class Recorder:
    """Wraps the model of a loop, and records the calls 1, k + 1, 2 k + 1 and so on of the model, and the last call.

        recorder = Recorder(model, every=10, samples=8)
        diffusion.p_sample_loop(recorder, shape, steps=100, x0=True, callback=recorder.keep)

    Args:
        model: the model that the loop samples from.
        every: k, at least 1.
        samples: how many of the batch's samples to record.

    Attributes:
        t: the recorded timesteps.
        x_t, x_0: for each recorded timestep the noisy samples and the predicted clean samples, (samples, channels,
            height, width) float32.
        calls: how often the model was called.
    """

    model: Callable[..., Any]
    every: int
    samples: int
    t: list[int | float] = field(default_factory=list)
    x_t: list[Array] = field(default_factory=list)
    x_0: list[Array] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, expected at least 1")

    def __call__(self, x: Tensor, t: Tensor, **model_kwargs: Any) -> Any:
        """Calls the model and records the first samples of x_t. If guidance doubles the batch, its halves are equal."""
        if self.calls and (self.calls - 1) % self.every:  # the call before was recorded only in case it was the last
            for recorded in (self.t, self.x_t, self.x_0):
                recorded.pop()
        self.t.append(t[0].item())
        self.x_t.append(self._copy_of_first(x))
        self.calls += 1
        return self.model(x, t, **model_kwargs)

    def keep(self, record: Record) -> None:
        """The loop's callback: records the predicted x_0 of the first step after a call of the model."""
        if len(self.x_0) < len(self.x_t):
            assert record.x0 is not None
            self.x_0.append(self._copy_of_first(record.x0))

    def _copy_of_first(self, x: Tensor) -> Array:
        return x[: self.samples].float().cpu().numpy().copy()

    def labels(self) -> list[str]:
        """A label for each recorded timestep: "t = 999"."""
        return [f"t = {timestep:.4g}" for timestep in self.t]
