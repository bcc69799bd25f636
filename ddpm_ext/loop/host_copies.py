"""Copies samples of a loop to the host while the loop continues."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy on the host. bfloat16 becomes float32, because numpy has no bfloat16."""
    x = x.float() if x.dtype == torch.bfloat16 else x
    return np.array(x.cpu().numpy())


class HostCopies:
    """Collects copies of samples as numpy arrays.

    For samples on a GPU, a separate stream copies them to two pinned buffers alternately. Before a buffer gets other
    samples, its content is copied to an array.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: list[np.ndarray] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: list[Tensor] = []
        # For each unfinished copy: the source's address, the pinned buffer, and an event recorded after the copy.
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def add(self, x: Tensor) -> None:
        """Copies the samples x. On a GPU, this starts the copy, after a wait for an older one if no buffer is free."""
        if self._stream is None:
            self._arrays.append(to_numpy(x))
            return
        if not self._pinned:
            self._pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True, device="cpu") for _ in range(2)]
        if len(self._pending) == len(self._pinned):
            self._finish_oldest()
        pinned_buffer = self._pinned[0]
        self._pinned.reverse()
        copied = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            pinned_buffer.copy_(x, non_blocking=True)
            copied.record(self._stream)
        self._pending.append((x.data_ptr(), pinned_buffer, copied))

    def before_overwriting(self, x: Tensor) -> None:
        """Makes the current stream wait until x is copied, so that a step can write to x. The host does not wait."""
        for address, _, copied in self._pending:
            if address == x.data_ptr():
                copied.wait(torch.cuda.current_stream(self._device))

    def arrays(self) -> list[np.ndarray]:
        """All copies, in order. Waits for copies that are not done."""
        while self._pending:
            self._finish_oldest()
        return self._arrays

    def _finish_oldest(self) -> None:
        _, pinned_buffer, copied = self._pending.popleft()
        copied.synchronize()
        self._arrays.append(to_numpy(pinned_buffer))
