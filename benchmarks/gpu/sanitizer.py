"""compute-sanitizer over every kernel variant: accesses, races, uninitialised memory, barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.context import ROOT, Check, Context
from benchmarks.gpu.machine import ask, nvcc_path
from benchmarks.gpu.part import tail

__all__ = ["TOOLS", "find", "measure", "verdict"]

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = "ddpm_ext"  # in the names of the kernels
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def find() -> str | None:
    """On PATH, or in the toolkit of nvcc."""
    folders = [Path(nvcc_path() or "nvcc").resolve().parent, Path("/usr/local/cuda/bin")]
    beside = [folder / "compute-sanitizer" for folder in folders]
    return shutil.which("compute-sanitizer") or next((str(path) for path in beside if path.is_file()), None)


def command(sanitizer: str, tool: str, help_text: str) -> list[str]:
    # torch tries calls that may fail; its own kernels are not ours to check, but write what ours read
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "1000"]
    if "--kernel-name " in help_text and tool != "initcheck":
        options += ["--kernel-name", f"kns={OURS}"]
    return [sanitizer, *options, sys.executable, "-m", "benchmarks.gpu.variants", "cuda"]


def verdict(tool: str, status: int | None, output: str) -> Check:
    summary = SUMMARY.search(output)
    cases = re.search(r"^(\d+) cases$", output, re.MULTILINE)
    if status is None:
        return Check(tool, None, "cut off")
    if summary is None or cases is None:
        return Check(tool, None, f"exit status {status}: {' / '.join(tail(output)[-3:])}")
    errors = int(summary[1] or summary[2] or 0)
    found = f"{errors} errors in {cases[1]} cases"
    if errors == 0 and status == 0:
        return Check(tool, True, found)
    lines = [line.lstrip("= ") for line in output.splitlines() if line.startswith("=====")]
    ours = next((i for i, line in enumerate(lines) if OURS in line), None)
    if ours is None:
        return Check(tool, None, f"exit status {status}, {found}, none of them in a kernel of ours")
    return Check(tool, False, f"{found}; first: {lines[max(ours - 1, 0)]} {lines[ours]}")


def measure(context: Context) -> None:
    if context.dry:  # the cases alone, and what would be run
        from benchmarks.gpu.variants import run

        count = run(context.device)
        context.results["command"] = " ".join(command("compute-sanitizer", TOOLS[0], "")[:-4])
        context.check(verdict(TOOLS[0], 0, f"{count} cases\n========= ERROR SUMMARY: 0 errors\n"))
        return
    sanitizer = find()
    if sanitizer is None:
        for tool in TOOLS:
            context.check(Check(tool, None, "compute-sanitizer is not installed"))
        return
    help_text = ask(sanitizer, "--help")
    context.results["version"] = (re.search(r"Version (\S+)", help_text) or ("", ""))[1]
    # each tensor in an allocation of its own, so that what lies behind it is nobody's
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_gpu_") as folder:
        running = {}
        for tool in TOOLS:  # side by side: most of the time is the host's
            log = Path(folder) / tool
            with log.open("wb") as out:
                running[tool] = subprocess.Popen(
                    command(sanitizer, tool, help_text),
                    cwd=ROOT,
                    env=env,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
        try:
            while context.left() > 0 and any(process.poll() is None for process in running.values()):
                time.sleep(0.2)
        finally:
            status = {tool: process.poll() for tool, process in running.items()}
            for process in running.values():
                process.kill()
                process.wait()
        for tool in TOOLS:
            context.check(verdict(tool, status[tool], (Path(folder) / tool).read_text(errors="replace")))
