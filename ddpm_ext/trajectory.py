"""What happens along a sampling loop: x_t and the predicted x_0 at some of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddpm_ext.steps import unwrap
from ddpm_ext.tables import prediction_coefficients

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["Recorder", "predicted_start"]

Array = npt.NDArray[np.float32]


@dataclass
class Recorder:
    """Stands in the model's place in a loop; keeps x_t and the predicted x_0 of every k-th call and of the last.

    `every`: k, at least 1. `steps`: how many calls the loop will make. `samples`: how many of the batch are kept.
    Afterwards `t`, `x_t` and `x_0` hold one entry a kept call: arrays (samples, channels, height, width) float32, x_0
    clipped to [-1, 1] as the loop clips it.
    """

    model: Callable[[Tensor, Tensor], Any]
    diffusion: GaussianDiffusion
    every: int
    steps: int
    samples: int
    t: list[int] = field(default_factory=list)
    x_t: list[Array] = field(default_factory=list)
    x_0: list[Array] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, expected at least 1")

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output = unwrap(self.model(x, t))
        if self.calls % self.every == 0 or self.calls == self.steps - 1:
            kept, moments, outputs = x[: self.samples], t[: self.samples], output[: self.samples]
            start = predicted_start(self.diffusion, kept, moments, outputs).clamp(-1, 1)
            self.t.append(int(t[0]))
            self.x_t.append(kept.detach().float().cpu().numpy().copy())
            self.x_0.append(start.detach().float().cpu().numpy().copy())
        self.calls += 1
        return output

    def labels(self) -> list[str]:
        """ "t = 999" and so on, one a kept call"""
        return [f"t = {moment}" for moment in self.t]


def predicted_start(diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """x_0 as the model sees it, not clipped; its `output` is what `diffusion.prediction` says."""
    coefficients = prediction_coefficients(diffusion.alphas_cumprod[t.cpu()], diffusion.prediction)
    a, b = (c.to(x_t.device).reshape(-1, *(1,) * (x_t.dim() - 1)) for c in coefficients)
    return (a * x_t + b * output).to(x_t.dtype)
