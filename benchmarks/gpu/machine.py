"""What the numbers of a run depend on: card, driver, clocks, versions, commit."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.context import ROOT, Context, cores

__all__ = ["ask", "measure", "nvcc_path"]

PACKAGES = ("numpy", "triton", "pytest", "diffusers", "setuptools", "ninja")
ASKED = (
    "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,"
    "ecc.mode.current,persistence_mode"
)


def ask(*command: str, seconds: float = 20) -> str:
    """What a command prints; nothing if there is none, or if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def nvcc_path() -> str | None:
    """As setup.py looks for it."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def clocks() -> dict[str, str]:
    """Driver, clocks and limits as nvidia-smi has them."""
    values = ask("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader").splitlines()
    return dict(zip(ASKED.split(","), (v.strip() for v in values[0].split(",")), strict=False)) if values else {}


def cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.machine()


def sources() -> str:
    """A hash of csrc: what was measured, also where git isn't."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()[:12]


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def card() -> dict[str, object]:
    """Raises RuntimeError where torch finds none."""
    if not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        raise RuntimeError(f"torch {torch.__version__} {why}; on a machine without one: --dry")
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "cards": torch.cuda.device_count(),
        "clocks": clocks(),
    }


def measure(context: Context) -> None:
    release = re.search(r"release ([\d.]+)", ask(nvcc_path() or "nvcc", "--version"))
    context.results |= {"card": "none (dry run)"} if context.dry else card()
    context.results |= {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": ask("git", "rev-parse", "HEAD") or None,
        "csrc": sources(),
        "changed_since_commit": bool(ask("git", "status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": release[1] if release else None,
        "python": platform.python_version(),
        "packages": versions(),
        "cpu": cpu(),
        "cores": cores(),
    }
