"""How fast: beside a copy of the bytes that must be moved, beside an empty launch, beside other ways.

Times of kernels are those of a CUDA graph of many launches, so that the host plays no part: "cold" where the launches
go round so many sets of inputs that the L2 cache has forgotten a set when it comes again, "warm" where there is one.
Times of calls are by the host's clock, launch included.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.empty import empty_launch
from benchmarks.gpu.machine import clocks
from benchmarks.gpu.timing import Spread, capture, per_call, spread, timed
from benchmarks.gpu.ways import OPERATIONS, Batch, batches, compiled, copies, gradient, others
from ddpm_ext import GaussianDiffusion, Philox

__all__ = ["measure"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, ...]


class Scale(NamedTuple):
    """How much is measured."""

    shapes: Sequence[Shape]
    compiled: Sequence[Shape]
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]]  # of samples and model output
    most: int  # launches in a graph
    times: int
    bytes: int  # moved by a graph, about
    seconds: float  # of a round of calls, about
    compiler: str


CARD = Scale(
    shapes=(
        (64, 3, 512, 512),
        (1, 3, 32, 32),
        (64, 3, 32, 32),
        (16, 3, 256, 256),
        (8, 3, 32, 32),
        (64, 3, 64, 64),
        (64, 3, 256, 256),
    ),
    compiled=((64, 3, 32, 32), (16, 3, 256, 256), (64, 3, 512, 512)),
    dtypes=((F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)),
    most=4096,
    times=15,
    bytes=8 * 10**9,
    seconds=0.02,
    compiler="inductor",
)
DRY = Scale(
    shapes=((2, 3, 64, 64), (1, 3, 32, 32)),
    compiled=((1, 3, 32, 32),),
    dtypes=((F32, F32), (F32, BF16)),
    most=8,
    times=3,
    bytes=10**5,
    seconds=1e-4,
    compiler="eager",
)


def microseconds(found: Spread) -> dict[str, float | int]:
    return {
        "us": round(found.median * 1e6, 3),
        "us_low": round(found.low * 1e6, 3),
        "us_high": round(found.high * 1e6, 3),
        "count": found.count,
    }


class Bench:
    """Measures on one device; results that serve several rows are measured once."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale = device, scale
        self.l2 = 2**15
        if device.type == "cuda":
            self.l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
        self.gd, self.rng = GaussianDiffusion(1000), Philox(0)
        self.copy = functools.cache(self._copy)

    def sets(self, moved: int, cold: bool) -> int:
        """So many sets of inputs that twice the L2 cache is gone through before one comes again."""
        return min(max(math.ceil(2 * self.l2 / moved), 2), self.scale.most) if cold else 1

    def launches(self, moved: int, sets: int) -> int:
        return max(sets, min(max(self.scale.bytes // moved, 8), 1024, self.scale.most))

    def kernel(self, calls: Sequence[Callable[[], Any]], launches: int, *, graph: bool = True) -> Spread:
        """Of one launch, the calls taking turns."""

        def run() -> None:
            for i in range(launches):
                calls[i % len(calls)]()

        replay = capture(run, self.device) if graph else run
        return spread([seconds / launches for seconds in timed(replay, self.device, self.scale.times)])

    def _copy(self, moved: int, cold: bool) -> Spread:
        """By a graph, or one by one where that may be faster, since another engine may do it."""
        sets = self.sets(moved, cold)
        calls, launches = copies(sets, moved, self.device), self.launches(moved, sets)
        ways = (True, False) if moved > self.l2 // 32 else (True,)
        return min(self.kernel(calls, launches, graph=graph) for graph in ways)

    @functools.cached_property
    def empty(self) -> Spread:
        return self.kernel([empty_launch(self.device).launch], min(1024, self.scale.most))

    def operation(
        self, name: str, shape: Shape, dtype: torch.dtype, second: torch.dtype, *, cold: bool
    ) -> dict[str, Any]:
        operation = OPERATIONS[name]
        moved = operation.moved(math.prod(shape), dtype, second)
        sets = self.sets(moved, cold)
        kept: list[Any] = []  # what is made anew must not be made in the same place

        def make(batch: Any) -> Callable[[], Any]:
            def call() -> None:
                result = operation.call(self.gd, batch, self.rng)
                if operation.keeps and cold:
                    kept.append(result)
                    del kept[:-sets]

            return call

        made = batches(sets, shape, dtype, second, self.device, operation.reads)
        found = self.kernel([make(batch) for batch in made], self.launches(moved, sets))
        copy = self.copy(moved, cold)
        return {
            "operation": name,
            "way": "ddpm_ext",
            "shape": list(shape),
            "dtype": " x, ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in (dtype, second)))
            + (" m" if dtype != second else ""),
            "cache": "warm" if not cold else "cold" if sets * moved > self.l2 else "half cold",
            **microseconds(found),
            "moved_bytes": moved,
            "l2_times": round(sets * moved / self.l2, 2),
            "copy_us": round(copy.median * 1e6, 3),
            "of_copy": round(copy.median / found.median, 4),
            "of_empty": round(found.median / self.empty.median, 3),
        }

    def call(self, operation: str, way: str, shape: Shape, function: Callable[[], Any]) -> dict[str, Any]:
        first = per_call(function, self.device, 1, 1)[0]
        calls = int(min(max(self.scale.seconds / max(first, 1e-7), 3), 200))
        found = spread(per_call(function, self.device, calls, max(self.scale.times // 2, 3)))
        return {"operation": operation, "way": way, "shape": list(shape), "dtype": "float32", **microseconds(found)}


Job = Callable[[], "tuple[str, dict[str, Any]]"]


def kernels(bench: Bench, names: Sequence[str], dtypes: Sequence[tuple[torch.dtype, torch.dtype]]) -> Iterator[Job]:
    for shape in bench.scale.shapes:
        for name in names:
            for dtype, second in dtypes:
                if second != dtype and not name.startswith("p_sample"):
                    continue
                # warm only where all of it fits
                moved = OPERATIONS[name].moved(math.prod(shape), dtype, second)
                for cold in (True, False) if moved < bench.l2 else (True,):
                    yield lambda s=shape, n=name, d=dtype, e=second, c=cold: (
                        "kernels",
                        bench.operation(n, s, d, e, cold=c),
                    )


def our_calls(bench: Bench) -> Iterator[Job]:
    gd, rng = bench.gd, bench.rng
    empty = empty_launch(bench.device)
    one = torch.zeros(1, device=bench.device)
    yield lambda: ("calls", bench.call("empty launch", empty.what, (), empty.launch))
    yield lambda: ("calls", bench.call("empty launch", "torch's fill_ of one element", (), lambda: one.fill_(1.0)))
    for shape in bench.scale.shapes:
        b = batches(1, shape, F32, F32, bench.device)[0]

        def trained(m: torch.Tensor, b: Batch = b) -> torch.Tensor:
            return gd.train_losses(lambda *_: m, b.x, b.t, rng=rng)

        ways = (
            ("p_sample", "ddpm_ext, out=", lambda b=b: gd.p_sample(lambda *_: b.m, b.x, b.t, rng=rng, out=b.out)),
            ("p_sample", "ddpm_ext", lambda b=b: gd.p_sample(lambda *_: b.m, b.x, b.t, rng=rng)),
            ("q_sample", "ddpm_ext", lambda b=b: gd.q_sample(b.x, b.t, rng=rng)),
            ("randn", "ddpm_ext", lambda b=b: OPERATIONS["randn"].call(gd, b, rng)),
            ("train_losses", "ddpm_ext", gradient(trained, b.m)),
        )
        for operation, way, function in ways:
            yield lambda o=operation, w=way, s=shape, f=function: ("calls", bench.call(o, w, s, f))


def other_calls(bench: Bench, *, compile: bool) -> Iterator[Job]:
    scale = bench.scale
    for shape in scale.compiled if compile else scale.shapes:
        b = batches(1, shape, F32, F32, bench.device)[0]
        for operation, way, function in compiled(b, scale.compiler) if compile else others(b):
            yield lambda o=operation, w=way, s=shape, f=function: ("calls", bench.call(o, w, s, f))


def jobs(bench: Bench) -> Iterator[Job]:
    """What is claimed first; what is slow to compile, and what says least, last."""
    first, *rest = bench.scale.dtypes
    remaining = [name for name in OPERATIONS if name != "p_sample"]
    yield from kernels(bench, ["p_sample"], [first])
    yield from our_calls(bench)
    yield from other_calls(bench, compile=False)
    yield from kernels(bench, remaining, [first])
    yield from kernels(bench, ["p_sample"], rest)
    yield from other_calls(bench, compile=True)
    yield from kernels(bench, remaining, rest)


@torch.no_grad()
def measure(context: Context) -> None:
    gc.freeze()  # torch before 2.9 collects garbage at every capture: this leaves it little to look at
    torch.manual_seed(0)
    bench = Bench(context.device, DRY if context.dry else CARD)
    results = context.results
    results |= {"l2_bytes": bench.l2, "clocks_before": clocks(), "skipped": []}
    if importlib.util.find_spec("diffusers") is None:
        results["skipped"].append("diffusers is not installed")
    results["empty"] = {"what": empty_launch(bench.device).what, **microseconds(bench.empty)}
    for job in jobs(bench):
        if context.left() < 2:
            results["cut_off"] = True
            break
        try:
            table, row = job()
        except Exception as error:  # one way that fails, or wants too much memory, must not lose the others
            if "CUDA error" in str(error):  # after this nothing works
                raise
            results["skipped"].append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        results.setdefault(table, []).append(row)
        context.save()
    results["clocks_after"] = clocks()
