"""The noise alone and a step without its model, beside eager PyTorch.

Both where the C library returns freed memory and where it keeps it. Eager code gains most where it is kept, so the
smaller of the two ratios is the one to state.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.base.heap import VARIABLES
from ddpm_ext.demo.eager import EagerDiffusion

HEAPS = ("default", "kept")
SHAPES = ((64, 3, 32, 32), (16, 3, 256, 256))
OPERATIONS = ("noise", "step")
ROUNDS, LEAST, T = 25, 0.02, 500

Key = TypeVar("Key")
Measured = Mapping[str, Mapping[str, float]]  # by heap; then microseconds by "operation, shape, way"


def named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def ways(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """What is timed, by "operation, shape, way". A step's result is the next one's sample, as in a loop."""
    gd, eager, rng, size = GaussianDiffusion(), EagerDiffusion(), Philox(0), named(shape)
    output, t = torch.randn(shape), torch.full(shape[:1], T)
    x = {"eager": torch.randn(shape), "ddpm_ext": torch.randn(shape)}

    def eager_step() -> None:
        x["eager"] = eager.p_sample(output, x["eager"], t)

    def step() -> None:
        x["ddpm_ext"] = gd.p_sample(lambda *_: output, x["ddpm_ext"], t, rng=rng)

    return {
        f"noise, {size}, eager": lambda: torch.randn(shape),
        f"noise, {size}, ddpm_ext": lambda: randn(shape, rng),
        f"step, {size}, eager": eager_step,
        f"step, {size}, ddpm_ext": step,
    }


def times(runs: Mapping[Key, Callable[[], Any]], rounds: int, least: float = LEAST) -> dict[Key, list[float]]:
    """Microseconds of each, in turns, so that other load on the machine slows all of them. A turn begins with a call
    that is not timed, and takes `least` seconds."""
    repeats: dict[Key, int] = {}
    for name, run in runs.items():
        run()
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, int(least / (time.perf_counter() - begin)))
    found: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            found[name].append((time.perf_counter() - begin) / repeats[name] * 1e6)
    return found


def medians(runs: Mapping[Key, Callable[[], Any]], rounds: int = ROUNDS) -> dict[Key, float]:
    return {name: statistics.median(each) for name, each in times(runs, rounds).items()}


@torch.no_grad()
def measure() -> str:
    """The microseconds in this process, as JSON."""
    found: dict[str, float] = {}
    for shape in SHAPES:
        found |= medians(ways(shape))
    return json.dumps(found)


def in_both_heaps() -> Measured:
    """Each heap in a process of its own, as glibc is told when a process begins."""
    keep = {name: str(value) for name, (_, value) in VARIABLES.items()}
    clean = {name: value for name, value in os.environ.items() if name not in keep}
    found = {}
    for heap in HEAPS:
        command = [sys.executable, "-m", "benchmarks.overview", "--heap", heap]
        env = clean | (keep if heap == "kept" else {})
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[heap] = json.loads(done.stdout)
    return found


def ratio(measured: Measured, operation: str, shape: tuple[int, ...]) -> float:
    """How many times as long eager PyTorch takes, in the heap that suits it better."""
    key = f"{operation}, {named(shape)}"
    return min(times[f"{key}, eager"] / times[f"{key}, ddpm_ext"] for times in measured.values())


def table(measured: Measured) -> list[str]:
    lines = [
        "## The noise, and a step without its model",
        "",
        "Medians in microseconds, float32. By default glibc returns the memory of large tensors to the system; kept: "
        + " ".join(f"`{name}={value}`" for name, (_, value) in VARIABLES.items())
        + ". The ratio is the smaller of both. A step's result is the next one's sample; the noise is drawn in it.",
        "",
        "| operation, shape | eager | ddpm_ext | eager, memory kept | ddpm_ext, memory kept | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for operation in OPERATIONS:
        for shape in SHAPES:
            key = f"{operation}, {named(shape)}"
            cells = [f"{measured[heap][f'{key}, {way}']:.0f}" for heap in HEAPS for way in ("eager", "ddpm_ext")]
            lines.append(f"| {key} | {' | '.join(cells)} | {ratio(measured, operation, shape):.1f} |")
    return lines
