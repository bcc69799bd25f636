"""One part in a process of its own: a kernel that breaks the CUDA context, or hangs, takes no other part with it.

`run` starts it and ends it in time; this as a module, `python -m benchmarks.gpu.part NAME ...`, is what it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT, Context

__all__ = ["run", "run_here", "scrub", "tail"]

TAIL = 15  # lines of a traceback or a log that are kept
MARGIN = 3.0  # seconds in which a part may end by itself before it is ended


def scrub(text: str) -> str:
    """Without this machine's paths, since results are published."""
    for path, name in ((ROOT, "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>"), (Path.home(), "~")):
        if len(str(path)) > 1:
            text = text.replace(str(path), name)
    return text


def tail(text: str) -> list[str]:
    return scrub(text).rstrip().splitlines()[-TAIL:]


def stop_group(process: subprocess.Popen[Any]) -> None:
    """A process started with start_new_session, and all that it started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(name: str, seconds: float, *, dry: bool = True, into: Path | None = None) -> dict[str, Any]:
    """Runs a part in this process: its status, "done" or "failed", seconds, results and an error's last lines."""
    started = time.monotonic()
    context = Context(dry=dry, seconds=seconds, into=into)
    try:
        importlib.import_module(f"{__package__}.{name}").measure(context)
    except KeyboardInterrupt:
        raise
    except BaseException:  # SystemExit too: whatever ends a part is in the report
        context.error = tail(traceback.format_exc())
    context.save()
    status = "failed" if context.error else "done"
    taken = round(time.monotonic() - started, 1)
    return {"status": status, "seconds": taken, "results": context.results, "error": context.error}


def run(name: str, seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """Runs a part in a process of its own, which may be "cut off" as well; what it had found by then is kept."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_gpu_") as folder:
        into, log = Path(folder) / "results.json", Path(folder) / "log.txt"
        command = [sys.executable, "-X", "faulthandler", "-m", f"{__package__}.part", name]
        command += ["--seconds", str(seconds), "--into", str(into), *["--dry"] * dry]
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait(timeout=max(seconds, 0.0))
                status = "done" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "cut off"
            finally:
                stop_group(process)
        found: dict[str, Any] = {"results": {}, "error": []}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(into.read_text(encoding="utf-8"))
        if status == "cut off":
            found["error"] = [f"after {seconds:.0f} s"]
        elif status == "failed" and not found["error"]:
            found["error"] = [*tail(log.read_text(errors="replace")), f"exit status {process.returncode}"]
    return {"status": status, "seconds": round(time.monotonic() - started, 1), **found}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    found = run_here(options.name, options.seconds - MARGIN, dry=options.dry, into=options.into)
    return int(found["status"] == "failed")


if __name__ == "__main__":
    sys.exit(main())
