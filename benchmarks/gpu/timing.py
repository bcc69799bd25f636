"""Time on a device: CUDA events and graphs on a GPU, the host's clock on the CPU."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.machine import limits

CYCLES = 2**20  # of a kernel that waits, by which the clock is measured: about half a millisecond
IDLE = 0.1  # seconds without work, after which a card may have lowered its clocks
Function = Callable[[], Any]


class Scale(NamedTuple):
    """How much is measured; by default, on a GPU."""

    launches: int = 4096  # in a graph, at most
    bytes: int = 8 * 10**9  # moved by a graph, about
    times: int = 15
    seconds: float = 0.02  # of a round of calls, about
    warm_up: float = 0.25  # seconds of work before a measurement, until an idle card has raised its clocks


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in microseconds."""
    low, median, high = (round(s * 1e6, 3) for s in statistics.quantiles(seconds, n=4, method="inclusive"))
    return {"us": median, "us_low": low, "us_high": high}


class Timer:
    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale, self.on_gpu = device, scale, device.type == "cuda"
        self.l2 = 2**15
        if self.on_gpu:
            limits()  # loads the driver's library, which takes longer than a measurement
            self.l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
        self.copy = functools.cache(self._copy)
        self.busy = -math.inf  # when the device was last at work, by the host's clock
        self.clock: dict[str, Any] = {}  # on a GPU, what the latest measurement ran at, and what held it down

    def sets(self, moved: int, cold: bool) -> int:
        """Cold, so many sets of inputs that twice the L2 cache is moved before one comes again."""
        return min(max(math.ceil(2 * self.l2 / moved), 2), self.scale.launches) if cold else 1

    def of_device(self, calls: Sequence[Function], moved: int, *, graph: bool = True) -> dict[str, Any]:
        """The device's time of one call, without the host's part, and its clock; the calls take turns."""
        launches = max(len(calls), min(max(self.scale.bytes // moved, 8), 1024, self.scale.launches))
        kept: deque[Any] = deque(maxlen=len(calls))  # so that new results are not written to the same place

        def run() -> None:
            for i in range(launches):
                kept.append(calls[i % len(calls)]())

        replay = self.capture(run) if graph and self.on_gpu else run
        return spread([seconds / launches for seconds in self.each(replay)]) | self.clock

    def of_calls(self, function: Function) -> dict[str, float]:
        """The host's time of one call, launch included."""
        self.warm_up(function)
        first = self.rounds(function, 1, 1)[0]
        calls = int(min(max(self.scale.seconds / max(first, 1e-7), 3), 200))
        return spread(self.rounds(function, calls, max(self.scale.times // 2, 3)))

    def _copy(self, moved: int, cold: bool) -> float:
        """Microseconds of a device-to-device copy that reads and writes `moved` bytes together, by a graph or by single
        calls, which another engine may make faster."""
        source = torch.randint(256, (self.sets(moved, cold), moved // 2), device=self.device, dtype=torch.uint8)
        calls = [functools.partial(torch.empty_like(x).copy_, x) for x in source]
        return min(self.of_device(calls, moved, graph=graph)["us"] for graph in {True, moved < self.l2 // 32})

    def capture(self, function: Function) -> Function:
        """Replays a function's launches from a CUDA graph."""
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        try:
            with torch.cuda.stream(aside):  # tables and handles are made before the capture
                function()
        finally:
            current.wait_stream(aside)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails may leave its own stream behind
        return graph.replay

    def warm_up(self, function: Function) -> None:
        """Keeps a device that was idle, as while something was compiled, at work until it has its full clocks."""
        now = time.perf_counter()
        end = now + (self.scale.warm_up if now - self.busy > IDLE else 0)
        while time.perf_counter() < end:
            function()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)

    def each(self, function: Function) -> list[float]:
        """Seconds on the device of each call, one right behind the other."""
        self.warm_up(function)
        if not self.on_gpu:
            return self.rounds(function, 1, self.scale.times)
        for _ in range(3):  # not waited for, so that the host stays ahead and no gap is measured
            function()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.scale.times + 2)]
        events[0].record()
        for event in events[1:-1]:
            function()
            event.record()
        torch.cuda._sleep(CYCLES)  # before the card is idle and changes its clock
        events[-1].record()
        limited = limits()  # while it is at work
        torch.cuda.synchronize(self.device)
        *found, waited = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
        self.busy = time.perf_counter()
        self.clock = {"mhz": round(CYCLES / waited / 1e6), "limits": limited}
        return found

    def rounds(self, function: Function, calls: int, times: int) -> list[float]:
        """Seconds a call by the host's clock, of each round."""
        found = []
        for _ in range(times + 1):  # the first round warms up
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
            self.busy = time.perf_counter()
            found.append((self.busy - start) / calls)
        return found[1:]
