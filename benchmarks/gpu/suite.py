"""The test suite on the card: the tests that need one, then all that can run there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import outcomes
from benchmarks.gpu.context import ROOT, Check, Context
from benchmarks.gpu.part import scrub, tail

__all__ = ["measure"]

OWN, SMALL = "tests/test_cuda.py", "tests/test_object.py"
SHOWN = 20  # failures that are kept


def pytest(arguments: Sequence[str], seconds: float, results: dict[str, object]) -> Check:
    """Runs the suite with `arguments`; what failed goes to `results`."""
    name = f"pytest {' '.join(arguments)}"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_gpu_") as folder:
        written, log = Path(folder) / "outcomes.jsonl", Path(folder) / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "-p", outcomes.__name__, *arguments],
                cwd=ROOT,
                env=os.environ | {outcomes.ENVIRONMENT: str(written), "PYTEST_ADDOPTS": ""},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                status: int | None = process.wait(timeout=max(seconds, 0.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                process.kill()
                process.wait()
        counts, failed, skipped = outcomes.read(written)
        last = tail(log.read_text(errors="replace"))
    results[name] = {
        "seconds": round(time.monotonic() - started, 1),
        "exit_status": status,
        "counts": dict(counts),
        "failed": [[test, scrub(why)] for test, why in failed[:SHOWN]],
        "skipped": {scrub(why): count for why, count in skipped.most_common(SHOWN)},
    }
    found = ", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "error", "skipped") if counts[o]) or "no tests"
    if failed:
        return Check(name, False, f"{found}; first: {failed[0][0]}")
    if status is None:
        return Check(name, None, f"cut off after {seconds:.0f} s: {found}")
    if status != 0 or not counts["passed"]:
        return Check(name, None, f"exit status {status}, {found}: {' / '.join(last[-2:])}")
    return Check(name, True, found)


def measure(context: Context) -> None:
    # without a card those of OWN are skipped, and a small file stands for the suite
    runs = [[OWN, SMALL]]
    if not context.dry:
        runs = [["--device", "cuda", OWN], ["--device", "cuda", f"--ignore={OWN}"]]
    for arguments in runs:
        context.check(pytest(arguments, context.left(), context.results))
