"""A training step as a CUDA graph: all its kernels, from the noise to the weights, in one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_ext.loop.cuda_graphs import CudaGraphs, restorer
from ddpm_ext.training.state import TrainState


class CapturedStep:
    """Takes training steps by replaying one CUDA graph.

    A graph reads its inputs from the addresses that were used at the capture. So each batch is copied into tensors of
    this object. For the same reason, the learning rate and the step's number, which selects the noise, are tensors. The
    graph itself adds 1 to the step's number.

    Args:
        compute: compute(images, t, weights, draw), with a fifth argument, labels, for images that have classes. It
            updates the model and returns the losses, (samples,), and the gradient's norm, (). t has the timesteps,
            weights the weights of the losses, (samples,) each. draw, int64 (), is the step's number.
        state: the state that `compute` changes.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, Tensor]], state: TrainState, device: torch.device) -> None:
        self._compute, self._state, self._device = compute, state, device
        self._graphs = CudaGraphs(device)
        self._inputs: list[Tensor] = []

    def take(
        self, images: Tensor, t: Tensor, weights: Tensor, labels: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Takes the next step; returns its losses, (samples,), and the gradient's norm, ().

        This object's first step runs without a graph, because the optimizer allocates its state in it. The second step
        is captured, and replayed from then on. If the capture fails, a warning says why, and no step has a graph.

        seed: the seed of torch's generators, from which dropout draws.
        """
        torch.manual_seed(seed)
        batch = [images, t, weights] if labels is None else [images, t, weights, labels]
        if not self._inputs:
            self._draw_number = torch.tensor(self._state.step, device=self._device)
            self._inputs = [tensor.clone() for tensor in batch]
            self._run()
        else:
            for buffer, tensor in zip(self._inputs, batch, strict=True):
                buffer.copy_(tensor)
            self._graphs.run("step", self._run, lambda: self._save(seed))
        losses, norm = self._results
        return losses.clone(), norm.clone()

    def _run(self) -> None:
        """Takes a step with the inputs in `_inputs`, and stores its results. The graph contains this function."""
        images, t, weights, *labels = self._inputs
        self._results = self._compute(images, t, weights, self._draw_number, *labels)
        self._draw_number.add_(1)

    def _save(self, seed: int) -> Callable[[], object]:
        """Saves the state, and returns a function that restores it.

        CudaGraphs takes a warm-up step before a capture, and undoes this step with the returned function.
        """
        restore = restorer([*self._state.changed_by_step(), self._draw_number])
        return lambda: (restore(), torch.manual_seed(seed))
