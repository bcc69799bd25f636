"""What the numbers depend on: card, driver, clocks, versions, commit."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.logs import NO_GPU
from benchmarks.gpu.parts import ROOT

CLOCKS = "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def output(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def asked(names: str) -> list[str]:
    """What nvidia-smi says of the first card; nothing where there is none."""
    return output("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader").split("\n")[0].split(", ")


def clock() -> str:
    """Of the multiprocessors now, in MHz; empty where nobody can tell."""
    return asked("clocks.sm")[0].removesuffix(" MHz")


def card() -> dict[str, Any]:
    if not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        return {NO_GPU: f"torch {torch.__version__} {why}"}
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory": f"{about.total_memory / 2**30:.0f} GiB",
        "L2 cache": f"{getattr(about, 'L2_cache_size', 0) / 2**20:.0f} MiB",
        "cards": torch.cuda.device_count(),
        **dict(zip(CLOCKS.split(","), asked(CLOCKS), strict=False)),
    }


def host() -> dict[str, Any]:
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    triton = [d.version for d in metadata.distributions(name="triton")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": output("git", "rev-parse", "HEAD") or "unknown",
        "changed": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "csrc": hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()[:12],
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "nvcc": output("nvcc", "--version").rpartition(" release ")[2].split(",")[0],
        "python": platform.python_version(),
        "triton": ", ".join(triton) or "none",
        "cpu": cpu,
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    found = {"card": "none (dry run)"} if "--dry" in sys.argv else card()
    print(json.dumps(found if NO_GPU in found else found | host()), flush=True)
