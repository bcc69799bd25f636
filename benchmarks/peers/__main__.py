"""make bench-peers: a table of the times of other libraries' steps, plain and accelerated. TABLE=FILE writes it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.conftest import machine
from benchmarks.overview.steps import medians
from benchmarks.peers.cases import Case, cases
from benchmarks.peers.first_loop import HEAD, first_loop_rows
from benchmarks.peers.pipelines import Count, table
from ddpm_ext import accelerate
from ddpm_ext.base.files import write_text

ROUNDS = 15  # how often each way is timed


def counted(run: Callable[[], Any], steps: int) -> tuple[float, float]:
    run()
    with Count() as count:
        run()
    return count.launches / steps, count.reads / steps


def row(case: Case, shape: tuple[int, ...]) -> str:
    objects = [case.obj, accelerate(case.obj), accelerate(case.obj, noise="philox", seed=0)]
    runs = [case.prepare(obj, shape) for obj in objects]
    plain, *others = (us / case.steps for us in medians(dict(enumerate(runs)), ROUNDS).values())
    counts = [counted(run, case.steps) for run in runs]
    cells = [case.library, case.what, f"{plain:.1f}"]
    for ours in others:
        cells += [f"{ours:.1f}", f"{plain / ours:.1f}"]
    cells += [" / ".join(f"{count[i]:.3g}" for count in counts) for i in (0, 1)]
    return f"| {' | '.join(cells)} |"


def versions(libraries: list[str]) -> str:
    found = []
    for library in libraries:
        try:
            found.append(f"{library} {metadata.version(library.replace('_', '-'))}")
        except metadata.PackageNotFoundError:
            found.append(f"{library} from a checkout")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", metavar="FILE", help="write the table to FILE")
    path = parser.parse_args().table
    torch.manual_seed(0)
    measured = list(cases())
    lines = ["# Other libraries, plain and accelerated", "", *(f"- {line}" for line in machine()[:2])]
    lines += [
        f"- {versions(list(dict.fromkeys(case.library for case in measured)))}",
        "- medians in microseconds of a step, the three ways in turn in one process, float32; the models cost nothing",
        "- launches: operators that write more than one number; reads: values that the host reads, each a "
        "synchronisation where they are on a GPU; plain / torch / philox, of a step; timesteps on a GPU are read once "
        "a loop more",
        "- what a library's own step takes depends on whether the allocator keeps its temporaries' memory: at "
        "64x3x32x32 up to twice as long in other runs, and at 64x4x64x64 ten times; ours repeat within a tenth on "
        "a quiet machine, but for samplers with history at 64x4x64x64, within a factor of three",
        "- `make bench-peers`, with what isn't installed on PYTHONPATH",
    ]
    for line in lines:
        print(line, flush=True)
    for shape in dict.fromkeys(shape for case in measured for shape in case.shapes):
        head = [
            "",
            f"## {'x'.join(map(str, shape))}",
            "",
            '| library | what | plain | noise="torch" | ratio | noise="philox" | ratio | launches | reads |',
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += head
        print("\n".join(head), flush=True)
        for case in (case for case in measured if shape in case.shapes):
            lines.append(row(case, shape))
            print(lines[-1], flush=True)
    if any(case.library == "diffusers" for case in measured):
        for line in itertools.chain(HEAD, first_loop_rows()):
            lines.append(line)
            print(line, flush=True)
    for line in table():
        lines.append(line)
        print(line, flush=True)
    if path:
        write_text(Path(path), "\n".join([*lines, ""]))


main()
