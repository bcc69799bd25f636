"""CUDA graphs of a loop's steps: the kernels that a step launches, the model's and ours, are captured and replayed.

Where nothing can be captured, a warning says why, and the step's calls are made each time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

import torch
from torch import nn

from ddpm_ext.base.torch_version import TORCH

_log = logging.getLogger(__name__)
# Up to torch 2.11, an allocator keeps the address of a graph whose capture failed.
_FAILED: list[torch.cuda.CUDAGraph] = []
_FAILURES_LEAVE_TRACES = TORCH < (2, 12)
_MANY_NODES = 20_000
# Torch's function by which an allocator leaves a graph's pool, by the name that torch 2.7 has for it or by today's.
_OLD_NAME = "_cuda_endAllocateCurrentStreamToPool"
END_ALLOCATE = _OLD_NAME if _OLD_NAME in vars(torch._C) else "_cuda_endAllocateToPool"


def restorer(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Copies what tensors hold; the function that it returns copies it back."""
    changing = [x.detach() for x in tensors]
    before = [x.clone() for x in changing]

    def restore() -> None:
        for x, value in zip(changing, before, strict=True):
            x.copy_(value)

    return restore


class CudaGraphs:
    """Captured graphs by key, all in one memory pool of their own."""

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

    def warn_of_many_nodes(self, model: object, steps: int) -> None:
        """Warns where one graph with nodes of each step would have tens of thousands of them, of which each layer of a
        Module is counted as one: it takes long to make, and much memory."""
        layers = [m for m in model.modules() if not any(m.children())] if isinstance(model, nn.Module) else []
        nodes = len(layers) * steps
        if self._possible and nodes >= _MANY_NODES:
            warnings.warn(
                f"graph is 'loop': {steps} steps with {len(layers)} layers each make a CUDA graph of some {nodes:,} "
                f"nodes, expected fewer than {_MANY_NODES:,}: graph='step' captures a single step",
                stacklevel=5,
            )

    def run(self, key: Hashable, step: Callable[[], None], save: Callable[[], Callable[[], object]]) -> None:
        """Does what `step` does, by replaying its graph, which is captured the first time that a key is used.

        `step` must read all that changes between calls from memory that stays where it is. It runs once before it is
        captured, so that libraries set themselves up; what `save` returned before then undoes what it did, also to what
        it reads.
        """
        if self._possible and key not in self._graphs:
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            try:
                self._capture(key, step, save)
            finally:  # whatever ends it: the buffers that the step writes may be freed next
                current.wait_stream(self._stream)
        if self._possible:
            self._graphs[key].replay()
        else:
            step()

    def _capture(self, key: Hashable, step: Callable[[], None], save: Callable[[], Callable[[], object]]) -> None:
        with torch.cuda.stream(self._stream):
            restore = save()
            step()
            restore()
        del restore  # with its copies, whose memory the graph may need
        reason = self._record(key, step)
        if reason is not None:
            self._possible = False
            self._fall_back(reason)

    def _record(self, key: Hashable, step: Callable[[], None]) -> str | None:
        """Captures the graph of a key. Returns None, or why that failed."""
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        try:
            with (
                torch.cuda.stream(self._stream),  # which some versions of torch.cuda.graph don't leave after a failure
                # Other threads, as the one that pins a DataLoader's batches, may go on with what a capture forbids.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    step()
                except Exception as error:
                    cause = error  # ending the failed capture raises an error of its own
                    raise
        except RuntimeError as error:
            if _FAILURES_LEAVE_TRACES:
                self._end(graph)
            return " ".join(str(cause or error).split())
        self._graphs[key] = graph
        _log.info("captured a CUDA graph on %s, number %d of this loop", self._device, len(self._graphs))
        return None

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends for torch's allocator and generator a capture that failed: to them it would go on, so that freed memory
        stayed in the pool, and each random number of torch's own raised an error."""
        _FAILED.append(graph)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # it never began
            getattr(torch._C, END_ALLOCATE)(index, self._pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())

    def _fall_back(self, reason: str) -> None:
        text = f"graph: steps are not captured in a CUDA graph ({reason}), but called one by one"
        warnings.warn(text, stacklevel=6)
        _log.info(text)
