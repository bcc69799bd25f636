"""CUDA graphs of a loop's steps: what a step launches, the model's kernels and ours, is recorded once and played again.

Where nothing can be recorded, the same calls are made each time in the recording's place, and a warning says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch

__all__ = ["CudaGraphs"]


class CudaGraphs:
    """Recordings by key, all from one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._possible = device.type == "cuda"
        if self._possible:
            self._pool = torch.cuda.graph_pool_handle()
            # torch's own stream for it is of the device that was current when the process first recorded anything
            self._stream = torch.cuda.Stream(device)
        else:
            self._fall_back(f"the samples are on {device}, where there are none")

    def run(self, key: Hashable, step: Callable[[], None], restore: Callable[[], object]) -> None:
        """Does what `step` does: the first time for a key by recording it, then by playing the recording.

        `step` must read all that changes from one time to the next from memory that stays where it is. `restore` takes
        back what it did: before a recording it runs once, so that libraries set themselves up.
        """
        if self._possible and key not in self._graphs:
            self._record(key, step, restore)
        if self._possible:
            self._graphs[key].replay()
        else:
            step()

    def _record(self, key: Hashable, step: Callable[[], None], restore: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # also leaves the stream where a capture fails, which some versions of torch then don't
        with torch.cuda.stream(self._stream):
            step()
            restore()
            cause: BaseException | None = None
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    try:
                        step()
                    except Exception as error:
                        cause = error  # the end of a capture that failed has an error of its own
                        raise
                self._graphs[key] = graph
            except RuntimeError as error:
                self._possible = False
                self._fall_back(" ".join(str(cause or error).split()))
        current.wait_stream(self._stream)

    def _fall_back(self, reason: str) -> None:
        warnings.warn(f"graph: steps are not captured in a CUDA graph ({reason}), but called one by one", stacklevel=6)
