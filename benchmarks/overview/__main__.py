"""python -m benchmarks.overview: the step's ratios, their chart and whole loops, in ten minutes on two idle cores.

--table FILE writes the numbers, --chart FILE the chart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.cpu.conftest import machine
from benchmarks.overview import loops, steps
from benchmarks.overview.chart import draw
from ddpm_ext.base.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--chart", metavar="FILE", help="draw the chart to FILE, .png or .svg")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each loop is timed (default: 5)")
    parser.add_argument("--heap", choices=steps.HEAPS, help=argparse.SUPPRESS)  # of the process that measures steps
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.heap:
        print(steps.measure())
        return
    lines = ["# Overview", "", *(f"- {line}" for line in machine()[:2]), "- `python -m benchmarks.overview`", ""]
    measured = steps.in_both_heaps()
    lines += steps.table(measured)
    print("\n".join(lines), flush=True)
    timed = list(loops.run(options.rounds))
    lines += ["", *loops.table(timed)]
    print("\n".join(loops.table(timed)))
    if options.table:
        write_text(Path(options.table), "\n".join([*lines, ""]))
    if options.chart:
        draw(measured, Path(options.chart))


if __name__ == "__main__":
    main()
