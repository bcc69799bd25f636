"""Compiles the CUDA kernels, disassembles them, and prints what each asks of a card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.static.cards import ARCHS
from benchmarks.static.compiler import EVERY_SOURCE, Missing, build_all, find_tools, version
from benchmarks.static.kernels import max_turns
from benchmarks.static.report import VECTOR, findings, render


def main() -> None:
    default = sorted({1, max_turns()})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, help="architectures; by default all that nvcc knows")
    parser.add_argument(
        "--source", nargs="+", choices=EVERY_SOURCE, default=EVERY_SOURCE, help="of csrc/cuda; all by default"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the report to FILE too")
    parser.add_argument(
        "--listing", metavar="TEXT", help='print the way through kernels of that title, as "ReverseStep, noise drawn"'
    )
    parser.add_argument(
        "--turns",
        type=int,
        nargs="+",
        default=default,
        help=f"vectors that a thread takes in kernels that loop; {default}",
    )
    options = parser.parse_args()
    try:
        tools = find_tools()
    except Missing as missing:
        sys.exit(f"benchmarks.static: {missing}")
    archs = options.arch or tools.archs
    if unknown := set(archs) - set(tools.archs):
        sys.exit(f"benchmarks.static: nvcc {version(tools.nvcc)} doesn't know sm_{', sm_'.join(sorted(unknown))}")
    builds = build_all(tools, options.source, archs)
    if options.listing is not None:
        for f in findings(builds):
            if f.variant.access == VECTOR and f.variant.title == options.listing:
                print(f"\n{f.variant.title}, {f.variant.dtypes}, sm_{f.arch}: {f.items} elements a turn")
                for i in f.path.once + f.path.turn:
                    print(f"  {i.address:05x} {'@' + i.guard if i.guard else '':5} {i.opcode:24} {i.operands}")
        return
    heading = [f"nvcc {version(tools.nvcc)}, nvdisasm {version(tools.nvdisasm)}", "`make sass`"]
    text = render(builds, heading, options.turns)
    print(text, end="")
    if options.table is not None:
        beside = options.table.with_name(f"{options.table.name}.part")
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        beside.replace(options.table)


if __name__ == "__main__":
    main()
