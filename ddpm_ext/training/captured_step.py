"""A training step as a CUDA graph: all its launches, from the noise to the weights, in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_ext.loop.cuda_graphs import CudaGraphs
from ddpm_ext.training.state import TrainState

__all__ = ["CapturedStep"]


class CapturedStep:
    """Takes steps by a graph that reads the batch, the learning rate and the noise's draw from memory that stays.

    Args:
        compute: computes losses and the gradient's norm from (images, t, weights, draw) and, where images have them,
            labels, and updates the weights; draw is int64 ().
        state: what `compute` changes.
    """

    def __init__(
        self,
        compute: Callable[..., tuple[Tensor, Tensor]],
        state: TrainState,
        device: torch.device,
    ) -> None:
        self._compute, self._state, self._device = compute, state, device
        self._graphs = CudaGraphs(device)
        self._inputs: list[Tensor] = []
        self._captured = False

    def take(
        self, images: Tensor, t: Tensor, weights: Tensor, labels: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor]:
        """The next step's losses and norm. `seed` is that of torch's generators, for dropout.

        The first step is taken by single calls, which make what the optimizer keeps. The second one is captured.
        """
        torch.manual_seed(seed)
        batch = [images, t, weights] if labels is None else [images, t, weights, labels]
        if not self._inputs:
            self._draw = torch.tensor(self._state.step, device=self._device)
            self._inputs = [value.clone() for value in batch]
            self._run()
        else:
            for own, given in zip(self._inputs, batch, strict=True):
                own.copy_(given)
            self._graphs.run("step", self._run, self._restore(seed))
            self._captured = True
        losses, norm = self._results
        return losses.clone(), norm.clone()

    def _run(self) -> None:
        images, t, weights, *labels = self._inputs
        self._results = self._compute(images, t, weights, self._draw, *labels)
        self._draw.add_(1)

    def _restore(self, seed: int) -> Callable[[], None]:
        """A function that undoes what a step changes."""
        changing = [] if self._captured else [*self._state.changing(), self._draw]
        before = [tensor.clone() for tensor in changing]

        @torch.no_grad()
        def restore() -> None:
            for tensor, saved in zip(changing, before, strict=True):
                tensor.copy_(saved)
            torch.manual_seed(seed)

        return restore
