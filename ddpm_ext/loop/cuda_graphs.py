"""CUDA graphs of a loop's steps. A graph has all kernels that a step launches, also those of the model.

If a step can't be captured, a warning gives the reason, and the steps run without a graph.
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
# Up to torch 2.11, torch's allocator keeps a pointer to a graph whose capture failed. So these graphs are never freed.
_FAILED: list[torch.cuda.CUDAGraph] = []
_FAILURES_LEAVE_TRACES = TORCH < (2, 12)
_MANY_NODES = 20_000  # a graph with this many nodes or more gets a warning
# Torch's function that ends the allocation in a graph's pool has a different name in torch 2.7.
_OLD_NAME = "_cuda_endAllocateCurrentStreamToPool"
END_ALLOCATE = _OLD_NAME if _OLD_NAME in vars(torch._C) else "_cuda_endAllocateToPool"


def restorer(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Copies the tensors, and returns a function that writes the values back to them."""
    targets = [x.detach() for x in tensors]
    copies = [x.clone() for x in targets]

    def restore() -> None:
        for x, value in zip(targets, copies, strict=True):
            x.copy_(value)

    return restore


class CudaGraphs:
    """Captures and replays CUDA graphs, which have keys and share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._possible = device.type == "cuda"
        if self._possible:
            self._pool = torch.cuda.graph_pool_handle()
            # A stream on this device: torch's default stream for captures is on the device of the first capture.
            self._stream = torch.cuda.Stream(device)
        else:
            self._fall_back(f"the samples are on {device}, where there are none")

    def warn_of_many_nodes(self, model: object, steps: int) -> None:
        """Warns if one graph of all steps would have tens of thousands of nodes, which takes much time and memory.

        Each layer of a Module counts as one node in each step.
        """
        layers = [m for m in model.modules() if not any(m.children())] if isinstance(model, nn.Module) else []
        nodes = len(layers) * steps
        if self._possible and nodes >= _MANY_NODES:
            warnings.warn(
                f"graph is 'loop': {steps} steps with {len(layers)} layers each make a CUDA graph of some {nodes:,} "
                f"nodes, expected fewer than {_MANY_NODES:,}: graph='step' captures a single step",
                stacklevel=5,
            )

    def run(self, key: Hashable, step: Callable[[], None], save: Callable[[], Callable[[], object]]) -> None:
        """Runs `step` by a replay of its CUDA graph, captured at the key's first use.

        If the step can't be captured, or the samples are not on a GPU, calls `step` itself.

        Args:
            key: the key of the graph.
            step: must read everything that changes between calls from memory with fixed addresses. It runs once before
                the capture, so that libraries initialize themselves.
            save: called before the run that precedes the capture. It saves all memory that `step` both reads and
                changes, and returns a function that restores it after the run.
        """
        if self._possible and key not in self._graphs:
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            try:
                self._warm_up_and_capture(key, step, save)
            finally:  # also after an error, since the caller may free buffers to which the stream still writes
                current.wait_stream(self._stream)
        if self._possible:
            self._graphs[key].replay()
        else:
            step()

    def _warm_up_and_capture(
        self, key: Hashable, step: Callable[[], None], save: Callable[[], Callable[[], object]]
    ) -> None:
        with torch.cuda.stream(self._stream):
            restore = save()
            step()
            restore()
        del restore  # frees its copies before the capture
        reason = self._capture_graph(key, step)
        if reason is not None:
            self._possible = False
            self._fall_back(reason)

    def _capture_graph(self, key: Hashable, step: Callable[[], None]) -> str | None:
        """Captures the graph of a key. Returns None, or the reason if it failed."""
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        try:
            with (
                torch.cuda.stream(self._stream),  # some versions of torch.cuda.graph don't exit the stream on an error
                # Other threads, such as one that pins a DataLoader's batches, may make calls that a capture forbids.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    step()
                except Exception as error:
                    cause = error  # torch.cuda.graph replaces this error by another one
                    raise
        except RuntimeError as error:
            if _FAILURES_LEAVE_TRACES:
                self._end(graph)
            return " ".join(str(cause or error).split())
        self._graphs[key] = graph
        _log.info("captured a CUDA graph on %s, number %d of this loop", self._device, len(self._graphs))
        return None

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tells torch's allocator and generator that a failed capture has ended.

        Otherwise freed memory would stay in the graph's pool, and each draw of torch's generator would raise an error.
        """
        _FAILED.append(graph)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # raised if the allocation from the pool has not begun
            getattr(torch._C, END_ALLOCATE)(index, self._pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())

    def _fall_back(self, reason: str) -> None:
        text = f"graph: steps are not captured in a CUDA graph ({reason}), but called one by one"
        warnings.warn(text, stacklevel=6)
        _log.info(text)
