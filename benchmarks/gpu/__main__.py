"""The parts, their order and their time.

Each part runs in a process of its own and is ended when its time is up (in a dry run in this one, to be quick); the
results are written anew after each. What a part doesn't need of its time, the later ones have.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu import claims, part, report
from benchmarks.gpu.context import ROOT

# Shares of the budget in seconds. First what all rests on, then whether it is right, then how fast; last what takes
# long and mostly repeats.
PARTS = {
    "machine": 15,
    "build": 110,
    "bits": 45,
    "costs": 30,
    "graphs": 25,
    "speed": 105,
    "suite": 85,
    "sanitizer": 65,
}
BUDGET = sum(PARTS.values())
BUILD_SHARE = 0.6  # of what is left, which a build may take: without one, nothing else is worth its time
LEAST = 8.0  # seconds, under which a part isn't started


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=report.COMMAND, description="Checks and measures the CUDA kernels.")
    parser.add_argument("--dry", action="store_true", help="the same code on the CPU with tiny sizes; needs --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: benchmarks/results)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all (default: {BUDGET})")
    parser.add_argument(
        "--only", metavar="PARTS", help=f"these parts, with commas between (default: {','.join(PARTS)}), machine always"
    )
    options = parser.parse_args()
    wanted = PARTS if options.only is None else ("machine", *options.only.split(","))
    for name in wanted:
        if name not in PARTS:
            parser.error(f"--only has {name!r}, expected some of {','.join(PARTS)}")
    options.only = [name for name in PARTS if name in wanted]
    if options.out is None:
        if options.dry:
            parser.error("--dry needs --out: its numbers are no results")
        options.out = ROOT / "benchmarks" / "results"
    return options


def limit(name: str, later: Sequence[str], left: float) -> float:
    """Seconds that a part may take of those that are left to it and to the later ones."""
    if name == "build":
        return left * BUILD_SHARE if later else left
    return left * PARTS[name] / sum(PARTS[n] for n in (name, *later))


def skipped(why: str) -> dict[str, Any]:
    return {"status": "skipped", "seconds": 0.0, "results": {}, "error": [why]}


def run_all(names: Sequence[str], *, budget: float, out: Path, dry: bool, parts: dict[str, Any]) -> None:
    """Fills `parts`, and writes them down after each."""
    started = time.monotonic()
    for i, name in enumerate(names):
        spent = time.monotonic() - started
        seconds = limit(name, names[i + 1 :], budget - spent)
        print(f"[{spent:3.0f} s] {name} ...", flush=True)
        if parts.get("build", {"status": "done"})["status"] != "done":
            parts[name] = skipped("nothing was built")
        elif seconds < LEAST:
            parts[name] = skipped("no time is left")
        else:
            parts[name] = part.run_here(name, seconds) if dry else part.run(name, seconds)
        if name == "machine" and parts[name]["error"]:
            print(parts[name]["error"][-1], file=sys.stderr)
            sys.exit(2)
        for line in parts[name]["error"]:
            print(f"         {line}", flush=True)
        try:
            report.write(out, parts, dry=dry)
        except Exception:  # a table that can't be made is no reason to measure no more
            traceback.print_exc()


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, interrupt)
    if options.dry:  # before torch is loaded: with tiny sizes threads only wait, and no GPU is what is expected
        os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "5"}
    parts: dict[str, Any] = {}
    try:
        run_all(options.only, budget=options.budget, out=options.out, dry=options.dry, parts=parts)
    except KeyboardInterrupt:
        print("interrupted: the results are those of the parts so far", file=sys.stderr)
        return 130
    verdicts = claims.judge(parts, dry=options.dry)
    print()
    for v in verdicts:
        print(f"{v.verdict:>12}  {v.claim}: {v.found}")
    print(f"\nresults in {options.out}")
    return int(claims.failed(verdicts))


if __name__ == "__main__":
    sys.exit(main())
