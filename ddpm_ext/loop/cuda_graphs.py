"""CUDA graphs of a loop's steps: the kernels that a step launches, the model's and ours, are captured and replayed.

Where nothing can be captured, a warning says why, and the step's calls are made each time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch

__all__ = ["CudaGraphs"]


class CudaGraphs:
    """Captured graphs by key, all in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._possible = device.type == "cuda"
        if self._possible:
            self._pool = torch.cuda.graph_pool_handle()
            # torch's own stream for captures belongs to the device that was current at the process's first capture.
            self._stream = torch.cuda.Stream(device)
        else:
            self._fall_back(f"the samples are on {device}, where there are none")

    def run(self, key: Hashable, step: Callable[[], None], restore: Callable[[], object]) -> None:
        """Does what `step` does, by replaying its graph, which is captured the first time that a key is used.

        `step` must read all that changes between calls from memory that stays where it is. It runs once before it is
        captured, so that libraries set themselves up, and `restore` then undoes what it did.
        """
        if self._possible and key not in self._graphs:
            self._capture(key, step, restore)
        if self._possible:
            self._graphs[key].replay()
        else:
            step()

    def _capture(self, key: Hashable, step: Callable[[], None], restore: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # This also leaves the stream when a capture fails, which some versions of torch do not.
        with torch.cuda.stream(self._stream):
            step()
            restore()
            cause: BaseException | None = None
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    try:
                        step()
                    except Exception as error:
                        cause = error  # ending the failed capture raises an error of its own
                        raise
                self._graphs[key] = graph
            except RuntimeError as error:
                self._possible = False
                self._fall_back(" ".join(str(cause or error).split()))
        current.wait_stream(self._stream)

    def _fall_back(self, reason: str) -> None:
        warnings.warn(f"graph: steps are not captured in a CUDA graph ({reason}), but called one by one", stacklevel=6)
