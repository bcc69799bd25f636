"""How fast: beside a copy of the bytes that must be moved, beside eager code and beside torch.compile.

    python -m benchmarks.gpu.speed steps|compiled|loop|rest [--dry]

Prints a row of JSON for each operation, way, shape and dtype:
    cold, warm: the device's own time, from a CUDA graph of many launches. Cold, the launches take turns over so many
        sets of inputs that the L2 cache has lost a set when it comes again; warm, there is one set.
    call: what a caller waits by the host's clock, launch included.
    of_copy: the time of a device-to-device copy that moves as many bytes as the operation must, over this one's.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Scale, Timer
from benchmarks.gpu.ways import GD, MOVED, REST, RNG, STEPS, TRAINING, Batch, Shape, T, Way, compiled, others

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Pair = tuple[torch.dtype, torch.dtype]  # of the samples and of the model's output
Job = Callable[[], dict[str, Any]]

# Large first, then the smallest, which a launch alone bounds.
SHAPES: tuple[Shape, ...] = (
    *((64, 3, 512, 512), (1, 3, 32, 32)),
    *((64, 3, 32, 32), (16, 3, 256, 256), (256, 3, 32, 32)),
)
DRY_SHAPES, DRY = ((2, 3, 64, 64), (1, 3, 32, 32)), Scale(8, 10**5, 3, 1e-4)
LOOP_STEPS = 50
MOST_SETS_OF_OTHERS = 256  # whose calls are many launches each


class Bench:
    def __init__(self, *, dry: bool) -> None:
        self.device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
        self.timer = Timer(self.device, DRY if dry else Scale())
        self.shapes, self.compiler = (DRY_SHAPES, "eager") if dry else (SHAPES, "inductor")

    def batches(self, count: int, way: Way, shape: Shape, pair: Pair) -> list[Batch]:
        """Sets of random values, each in its own memory. What is not read is one tensor for all."""

        def make(name: str, dtype: torch.dtype) -> Tensor:
            if name in MOVED[way.operation]:
                return torch.randn(count, *shape, device=self.device, dtype=dtype)
            return torch.zeros(shape, device=self.device, dtype=dtype).expand(count, *shape)

        tensors = make("x", pair[0]), make("m", pair[1]), make("noise", pair[0]), make("out", pair[0])
        t = torch.full(shape[:1], T, device=self.device)
        return [Batch(*(tensor[i] for tensor in tensors), t) for i in range(count)]

    def row(self, way: Way, shape: Shape, pair: Pair) -> dict[str, Any]:
        sizes = {"x": pair[0], "m": pair[1], "noise": pair[0], "out": pair[0]}
        moved = math.prod(shape) * sum(sizes[name].itemsize for name in MOVED[way.operation])
        dtype = ", model ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(pair))
        found: dict[str, Any] = {"operation": way.operation, "way": way.way, "shape": list(shape), "dtype": dtype}
        found["moved_bytes"] = moved
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
        for shape in shapes:
            for pair in pairs:
                for way in ways:
                    yield functools.partial(self.row, way, shape, pair)


def steps(bench: Bench) -> Iterator[Job]:
    def empty() -> dict[str, Any]:
        """A kernel that does nothing; on the CPU a call of nothing."""
        launch = functools.partial(torch.cuda._sleep, 0) if bench.device.type == "cuda" else int
        found = {"operation": "empty launch", "way": "torch.cuda._sleep(0)", "shape": [], "dtype": ""}
        return found | {"warm": bench.timer.of_device([launch], 10**6), "call": bench.timer.of_calls(launch)}

    yield empty
    peers = [way for way in others(bench.device) if way.operation == "p_sample"]
    for shapes in (bench.shapes[:2], bench.shapes[2:]):
        yield from bench.jobs([*STEPS, *peers], [(F32, F32)], shapes)
        yield from bench.jobs(STEPS[:1], [(BF16, BF16)], shapes)
    yield from bench.jobs(STEPS[:1], [(F16, F16), (F32, BF16)], bench.shapes)


def compile_all(bench: Bench) -> Iterator[Job]:
    """The step at every shape comes first, since each shape is compiled anew, in seconds."""
    for operation in ("p_sample", "q_sample", "train_losses"):
        for shape in bench.shapes:
            ways = [way for way in compiled(bench.device, bench.compiler) if way.operation == operation]
            yield from bench.jobs(ways, [(F32, F32)], [shape])


def loop(bench: Bench) -> Iterator[Job]:
    """The time of a step in a whole loop with a model of one operation, by one call a step and by CUDA graphs."""
    how: dict[str, Any] = {"steps": LOOP_STEPS, "device": bench.device}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    def row(shape: Shape, graph: str) -> dict[str, Any]:
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
    others_too = [*REST, TRAINING, *(way for way in others(bench.device) if way.operation != "p_sample")]
    yield from bench.jobs(REST, [(F32, F32), (BF16, BF16)], bench.shapes[:1])
    yield from bench.jobs(others_too, [(F32, F32)], bench.shapes[1:])
    yield from bench.jobs(others_too[len(REST) :], [(F32, F32)], bench.shapes[:1])
    yield from bench.jobs(REST, [(BF16, BF16), (F16, F16)], bench.shapes[1:])


GROUPS = {"steps": steps, "compiled": compile_all, "loop": loop, "rest": rest}


@torch.no_grad()
def measured(group: str, bench: Bench) -> Iterator[dict[str, Any]]:
    for job in GROUPS[group](bench):
        try:
            yield job()
        except Exception as error:  # one way that fails, or wants too much memory, must not lose the others
            yield {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            if "CUDA error" in str(error):  # nothing works in this process any more
                raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times one group of operations.")
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    options = parser.parse_args()
    gc.freeze()  # torch before 2.9 collects garbage at every capture; this leaves it little to look at
    torch.manual_seed(0)
    for row in measured(options.group, Bench(dry=options.dry)):
        print(json.dumps(row), flush=True)
