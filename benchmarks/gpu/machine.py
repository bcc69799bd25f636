"""What the numbers depend on: card, driver, clocks, versions, commit."""

from __future__ import annotations

import ctypes
import datetime
import functools
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


# What may hold a card's clocks down, by NVML's bits. Its bit 1 says that the card is idle.
LIMITS = {
    **{0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost"},
    **{0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks"},
}


def uuid() -> str:
    """The current card's, by which NVIDIA's tools know it whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def asked(names: str) -> list[str]:
    """What nvidia-smi says of the current card; nothing where it can't."""
    return output("nvidia-smi", "-i", uuid(), f"--query-gpu={names}", "--format=csv,noheader").split(", ")


@functools.cache
def _nvml() -> tuple[Any, ctypes.c_void_p]:
    """The driver's library and its handle of the current card."""
    library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid().encode(), ctypes.byref(handle)):
        raise OSError("NVML does not know the card")
    return library, handle


def limits() -> str:
    """What holds the current card's clocks down now, "none" or, where nobody can tell, "unknown"."""
    bits = ctypes.c_ulonglong()
    try:
        library, handle = _nvml()
        failed = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(bits))
    except (OSError, AttributeError):
        return "unknown"
    return "unknown" if failed else ", ".join(name for bit, name in LIMITS.items() if bits.value & bit) or "none"


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


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def host() -> dict[str, Any]:
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
        "cpu": cpu(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    found = {"card": "none (dry run)"} if "--dry" in sys.argv else card()
    print(json.dumps(found if NO_GPU in found else found | host()), flush=True)
