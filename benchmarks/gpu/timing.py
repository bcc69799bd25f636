"""Time on a device: CUDA events and graphs on a GPU, the host's clock on the CPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Spread", "capture", "per_call", "spread", "timed"]

Function = Callable[[], Any]


class Spread(NamedTuple):
    """Seconds: the median and the quartiles of `count` measurements."""

    median: float
    low: float
    high: float
    count: int


def spread(seconds: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(median, low, high, len(seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(function: Function, device: torch.device) -> Function:
    """What replays a function's launches from a CUDA graph, without the host's part; on the CPU the function itself."""
    if device.type != "cuda":
        return function
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # tables, handles and the like come into being outside of the graph
        function()
    torch.cuda.current_stream(device).wait_stream(aside)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            function()
    except BaseException:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own stream behind
        raise
    return graph.replay


def timed(function: Function, device: torch.device, times: int, warm: int = 3) -> list[float]:
    """Seconds of each of `times` calls, on the device, one right behind the other."""
    for _ in range(warm):
        function()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(times):
            function()
            marks.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(marks)]
    # no synchronisation after the warm-up: the host gets ahead, and no gap is measured
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def per_call(function: Function, device: torch.device, calls: int, times: int) -> list[float]:
    """Seconds a call by the host's clock, of `times` rounds of `calls`: what a caller waits, launch included."""
    found = []
    for _ in range(times + 1):  # the first is the warm-up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        found.append((time.perf_counter() - start) / calls)
    return found[1:]
