"""How fast: beside a copy of the bytes that must be moved, beside eager code and beside torch.compile.

    python -m benchmarks.gpu.speed steps|loop|rest [--dry]

Prints a row of JSON for each operation, way, shape and dtype:
    cold, warm: the device's own time, from a CUDA graph of many launches. Cold, the launches take turns over so many
        sets of inputs that the L2 cache has lost a set when it comes again; warm, there is one set.
    call: what a caller waits by the host's clock, launch included.
    of_copy: the time of a device-to-device copy that moves as many bytes as the operation must, over this one's.
    mhz, limits: of cold and of warm, the multiprocessors' clock right behind the launches, and what held it down.

The rows are measured in a process beside this one. Behind one that fails another process goes on, so that it loses no
other.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.names import NEAR
from benchmarks.gpu.timing import Scale, Timer
from benchmarks.gpu.ways import (
    CHANNELS_LAST,
    GD,
    MOVED,
    OF_MODEL,
    REST,
    RNG,
    STEPS,
    TRAINING,
    WITH_HISTORY,
    WITH_OPTIONS,
    Batch,
    Shape,
    T,
    Way,
    compiled,
    others,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Pair = tuple[torch.dtype, torch.dtype]  # of the samples and of the model's output
Row = dict[str, Any]
Job = Callable[[], Row]

# Large first, then the smallest, which a launch alone bounds, and the latents of 64 images of 512 x 512.
SHAPES: tuple[Shape, ...] = (
    *((64, 3, 512, 512), (1, 3, 32, 32), (64, 4, 64, 64)),
    *((16, 3, 256, 256), (256, 3, 32, 32), (64, 3, 32, 32)),
)
DRY_SHAPES, DRY = ((2, 3, 64, 64), (1, 3, 32, 32)), Scale(8, 10**5, 3, 1e-4, 0)
PRETENDED = "DDPM_EXT_PRETENDED_CARD" in os.environ  # by a rehearsal, whose card is a CPU
LOOP_STEPS = 50
MOST_SETS_OF_OTHERS = 256  # whose calls are many launches each
MOST_SECONDS = 40  # for a row; inductor may take half of them


class Bench:
    """Nothing is on the device before a row is measured, since a process that has used CUDA cannot be forked."""

    def __init__(self, *, dry: bool) -> None:
        tiny = dry or PRETENDED
        self.device, self.scale = torch.device("cpu" if dry else "cuda"), DRY if tiny else Scale()
        self.shapes, self.compiler = (DRY_SHAPES, "eager") if tiny else (SHAPES, "inductor")

    @functools.cached_property
    def timer(self) -> Timer:
        return Timer(self.device, self.scale)

    def batches(self, count: int, way: Way, shape: Shape, pair: Pair) -> list[Batch]:
        """Sets of random values, each in its own memory. What is not read is one tensor for all."""

        def make(name: str) -> Tensor:
            dtype = pair[name in OF_MODEL]
            if name in way.channels_last:
                batch, channels, *sides = shape
                return torch.randn(count, batch, *sides, channels, device=self.device, dtype=dtype).movedim(-1, 2)
            if name in MOVED[way.operation]:
                return torch.randn(count, *shape, device=self.device, dtype=dtype)
            return torch.zeros(shape, device=self.device, dtype=dtype).expand(count, *shape)

        tensors = [make(name) for name in Batch._fields[:-1]]
        t = torch.full(shape[:1], T, device=self.device)
        return [Batch(*(tensor[i] for tensor in tensors), t) for i in range(count)]

    def about(self, way: Way, shape: Shape, pair: Pair) -> Row:
        moved = math.prod(shape) * sum(pair[name in OF_MODEL].itemsize for name in MOVED[way.operation])
        dtype = ", model ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(pair))
        about = {"operation": way.operation, "way": way.way, "shape": list(shape), "dtype": dtype}
        return about | {"moved_bytes": moved}

    def row(self, way: Way, shape: Shape, pair: Pair) -> Row:
        found = self.about(way, shape, pair)
        moved = found["moved_bytes"]
        one_launch = way.way.startswith(("ddpm_ext", "torch.add"))
        for name, cold in (("cold", True), ("warm", False)):
            sets = self.timer.sets(moved, cold)
            fits = cold or moved <= self.timer.l2
            if way.captured and fits and (one_launch or sets <= MOST_SETS_OF_OTHERS):
                calls = [functools.partial(way.call, b) for b in self.batches(sets, way, shape, pair)]
                time, copy = self.timer.of_device(calls, moved), self.timer.copy(moved, cold)
                found[name] = time | {"copy_us": copy, "of_copy": round(copy / time["us"], 4)}
        (b,) = self.batches(1, way, shape, pair)
        return found | {"call": self.timer.of_calls(lambda: way.call(b))}

    def jobs(self, ways: Iterable[Way], pairs: Iterable[Pair], shapes: Iterable[Shape]) -> Iterator[Job]:
        for way in ways:
            for shape in shapes:
                for pair in pairs:
                    yield functools.partial(self.row, way, shape, pair)


def steps(bench: Bench) -> Iterator[Job]:
    """What matters most: a step at three shapes beside a kernel of three tensors, eager code, that compiled, and
    diffusers'."""

    def empty() -> Row:
        """A kernel that does nothing; on the CPU a call of nothing."""
        launch = functools.partial(torch.cuda._sleep, 0) if bench.device.type == "cuda" else int
        found = {"operation": "empty launch", "way": "torch.cuda._sleep(0)", "shape": [], "dtype": ""}
        return found | {"warm": bench.timer.of_device([launch], 10**6), "call": bench.timer.of_calls(launch)}

    yield empty
    ours, _, add = STEPS
    near, *peers = [way for way in (*others(), *compiled(bench.compiler)) if way.operation == "p_sample"]
    peers = [near, *reversed(peers)]  # what is compiled comes second
    yield from bench.jobs([ours, add], [(F32, F32), (BF16, BF16)], bench.shapes[:3])
    yield from bench.jobs(CHANNELS_LAST, [(F32, F32)], bench.shapes[:1])
    yield from bench.jobs(peers, [(F32, F32)], bench.shapes[:3])
    yield from bench.jobs(peers, [(BF16, BF16)], bench.shapes[:2])


def loop(bench: Bench) -> Iterator[Job]:
    """The time of a step in a whole loop with a model of one operation, by one call a step and by CUDA graphs."""
    how: dict[str, Any] = {"steps": LOOP_STEPS, "device": bench.device}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    def row(shape: Shape, graph: str) -> Row:
        run = functools.partial(GD.p_sample_loop, model, shape, rng=RNG, record="last", progress=False, **how)
        if graph:
            run = functools.partial(GD.capture(model, shape, graph=graph, **how), RNG)
        time = {key: round(us / LOOP_STEPS, 3) for key, us in bench.timer.of_calls(run).items()}
        found = {"operation": "a step of a loop", "way": f"ddpm_ext, {graph or 'no'} graph", "shape": list(shape)}
        return found | {"dtype": "float32", "call": time}

    for shape in bench.shapes[1:]:
        for graph in ("", "step", "loop"):
            yield functools.partial(row, shape, graph)


def rest(bench: Bench) -> Iterator[Job]:
    both, large, others_too = [(F32, F32), (BF16, BF16)], bench.shapes[:1], [*others(), *compiled(bench.compiler)]
    yield from bench.jobs(STEPS[::2], both, bench.shapes[3:])
    yield from bench.jobs([*WITH_HISTORY, *REST], both, large)
    # Of odd sides, so that nearly all samples begin off alignment.
    batch, channels, *sides = large[0]
    usual = [way for way in REST if way.operation in WITH_OPTIONS]
    off_alignment = [(batch, channels, *(side - 1 for side in sides))]
    yield from bench.jobs([STEPS[0], *WITH_HISTORY[:1], *usual], both, off_alignment)
    yield from bench.jobs([TRAINING], [(F32, F32)], bench.shapes)
    yield from bench.jobs([way for way in others_too if way.operation != "p_sample"], [(F32, F32)], large)
    yield from bench.jobs([*WITH_HISTORY, *REST], [(F32, F32)], bench.shapes[1:])
    yield from bench.jobs(STEPS[1:2], [(F32, F32)], bench.shapes)
    yield from bench.jobs(STEPS[:1], [(F16, F16), (F32, BF16)], bench.shapes)
    yield from bench.jobs([way for way in others_too if way.way != NEAR], [(F32, F32)], bench.shapes[3:])


GROUPS = {"steps": steps, "loop": loop, "rest": rest}


@torch.no_grad()
def attempt(job: Job) -> Row:
    """A job's row, or why there is none."""
    try:
        return job()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def work(jobs: Iterable[Job], there: Connection) -> None:
    """Sends the jobs' rows, up to the first error, which may have left CUDA of no use."""
    for job in jobs:
        row = attempt(job)
        there.send(row)
        if "error" in row:
            return
        gc.collect()
        torch.cuda.empty_cache()


def apart(jobs: Iterable[Job]) -> Iterator[Row]:
    """The jobs' rows, from one forked process after the other: each is left at its first error."""
    fork, todo = multiprocessing.get_context("fork"), deque(jobs)
    while todo:
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=work, args=(todo, there))
        process.start()
        there.close()
        row: Row = {}
        while todo and "error" not in row:
            row = {"error": f"it took longer than {MOST_SECONDS} s"}
            if here.poll(MOST_SECONDS):
                try:
                    row = here.recv()
                except EOFError:  # it crashed
                    process.join()
                    row = {"error": f"exit status {process.exitcode}"}
            todo.popleft()
            yield row
        process.kill()
        process.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times one group of operations.")
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    options = parser.parse_args()
    gc.freeze()  # torch before 2.9 collects garbage at every capture; this leaves it little to look at
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else each compiling process starts one a core
    torch.manual_seed(0)
    for found in apart(GROUPS[options.group](Bench(dry=options.dry))):
        print(json.dumps(found), flush=True)
