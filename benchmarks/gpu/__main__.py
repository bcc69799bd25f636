"""Runs the parts: each in a process of its own, in its time, with the results written anew after each."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.logs import FAIL, NO_GPU, NOT_MEASURED, Result
from benchmarks.gpu.parts import ROOT, Part, all_parts, build_seconds
from benchmarks.gpu.report import COMMAND, markdown

GRACE = 4.0  # seconds between the request to end and the end itself, in which pytest prints how tests failed
NEEDED = ("torch", "numpy", "setuptools", "wheel", "pybind11", "ninja", "pytest", "hypothesis")
LEAST = 8.0  # seconds, under which a part is not started
Results = dict[str, dict[str, Any]]  # by part: verdict, found, seconds, rows


def scrub(text: str) -> str:
    """Without this machine's paths, since results are published."""
    for path, name in ((ROOT, "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>"), (Path.home(), "~")):
        text = text.replace(str(path), name) if len(str(path)) > 1 else text
    return text


def end(process: subprocess.Popen[bytes], by: signal.Signals) -> None:
    """Signals a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, by)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end, so that a process that is started here is known by then.

    That process accepts both, even where this one ignores SIGINT, as what a shell starts in the background does.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def run(part: Part, seconds: float, log: Path) -> int | None:
    """Its exit status, or None if it was cut off. Its output is in `log` as it comes."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTEST_ADDOPTS": ""} | dict(part.environment)
    how: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    with log.open("wb") as out, contextlib.ExitStack() as started:
        with signals_held():
            process = subprocess.Popen(part.command, stdout=out, stderr=subprocess.STDOUT, **how)
            started.enter_context(process)
            started.callback(end, process, signal.SIGKILL)
        try:
            return process.wait(timeout=max(seconds - GRACE, 0))
        except subprocess.TimeoutExpired:
            end(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
            return None


def result_of(part: Part, seconds: float, log: Path) -> Result:
    if not part.command:
        return Result(NOT_MEASURED, "nothing to run it with")
    if seconds < LEAST:
        return Result(NOT_MEASURED, "no time was left")
    try:
        status = run(part, seconds, log)
        return part.read(scrub(log.read_text(encoding="utf-8", errors="replace")), status)
    except Exception as error:  # what goes wrong with one part must not stop the next
        return Result(FAIL, f"{type(error).__name__}: {scrub(str(error))}")


def replace_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it, so that there is always a whole one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write(out: Path, name: str, results: Results) -> None:
    """The results so far as JSON and as Markdown, and the last part's log below the others."""
    replace_text(out / f"{name}.json", json.dumps({"command": COMMAND, "parts": results}, indent=1) + "\n")
    replace_text(out / f"{name}.md", markdown(results))
    running = out / "running.log"
    if running.exists():
        with (out / f"{name}.log").open("w" if len(results) == 1 else "a", encoding="utf-8") as logs:
            logs.write(f"\n==== {[*results][-1]}\n{scrub(running.read_text(encoding='utf-8', errors='replace'))}")
        running.unlink()


def file_name(results: Mapping[str, Any]) -> str:
    """The card's: `nvidia-h100-80gb-hbm3`, for example."""
    rows = results.get("machine", {}).get("rows") or [{}]
    return re.sub(r"[^a-z0-9]+", "-", rows[0].get("card", "unknown card").lower()).strip("-")


def run_all(parts: Sequence[Part], budget: float, out: Path) -> int:
    """Each part may run until the shares of all parts up to it are over. Returns the exit status."""
    results: Results = {}
    started, shares, total = time.monotonic(), 0.0, sum(part.seconds for part in parts if not part.apart)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        shares += 0 if part.apart else part.seconds
        spent = time.monotonic() - started
        about = f", about {build_seconds():.0f} s on {os.cpu_count()} cores," if part.apart else ""
        print(f"[{spent:3.0f} s] {part.name}{about} ...", flush=True)
        seconds = part.seconds if part.apart else budget * shares / total - spent
        result = result_of(part, seconds, out / "running.log")
        taken = round(time.monotonic() - started - spent, 1)
        started += taken if part.apart else 0.0
        if result.rows and NO_GPU in result.rows[0]:
            (out / "running.log").unlink()
            print(f"{result.rows[0][NO_GPU]}; on a machine without a GPU: --dry", file=sys.stderr)
            return 2
        results[part.name] = {**result._asdict(), "seconds": taken}
        write(out, file_name(results), results)
        print(f"        {result.verdict}: {result.found}", flush=True)
    print(f"\nresults in {out}")
    return int(any(part["verdict"] == FAIL for part in results.values()))


def missing() -> list[str]:
    """The packages that the parts need and this Python has not."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def is_cuda_build(torch: str | None) -> bool:
    """Whether the torch whose __init__.py has this path is built with CUDA. It is not imported, which takes seconds."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"^cuda\b.*= *['\"]", Path(torch or "").with_name("version.py").read_text(), re.M) is not None
    return False


def take_venv() -> None:
    """Goes on in .venv where that has a CUDA build of torch and this Python has not, or lacks something."""
    own = ROOT / ".venv" / "bin" / "python"
    if not own.exists() or Path(sys.prefix) == own.parent.parent:
        return
    here = importlib.util.find_spec("torch")
    if not missing() and is_cuda_build(here and here.origin):
        return
    code = "from importlib.util import find_spec; print(getattr(find_spec('torch'), 'origin', ''))"
    there = subprocess.run([own, "-c", code], capture_output=True, text=True).stdout.strip()
    if is_cuda_build(there):
        os.execv(own, [str(own), "-m", "benchmarks.gpu", *sys.argv[1:]])


def main() -> int:
    if lacks := missing():
        names = ", ".join(lacks).replace("torch", "torch (2.7 or later, built with CUDA)")
        print(f"not installed: {names}; run: {sys.executable} -m pip install {' '.join(lacks)}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog=COMMAND, description="Checks and measures the CUDA kernels.")
    parser.add_argument("--dry", action="store_true", help="run the same on the CPU with tiny sizes; needs --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: benchmarks/results)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="time for all parts but the build (default: six and a half minutes)",
    )
    parser.add_argument("--only", metavar="PARTS", help="these parts, with commas between, and the machine's always")
    options = parser.parse_args()
    if options.dry and options.out is None:
        parser.error("--dry needs --out, since its numbers are no results")
    if options.dry:
        os.environ["OMP_NUM_THREADS"] = "1"  # with tiny sizes, threads only wait for one another
    parts = {part.name: part for part in all_parts(dry=options.dry)}
    wanted = [*parts] if options.only is None else ["machine", *options.only.split(",")]
    if unknown := sorted(set(wanted) - set(parts)):
        parser.error(f"--only has {unknown[0]!r}, expected some of {','.join(parts)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    budget = options.budget or sum(part.seconds for part in parts.values() if not part.apart)
    out = options.out or ROOT / "benchmarks" / "results"
    try:
        return run_all([part for name, part in parts.items() if name in wanted], budget, out)
    except KeyboardInterrupt:
        print("interrupted: the results are those of the parts so far", file=sys.stderr)
        return 130


if __name__ == "__main__":
    take_venv()
    sys.exit(main())
