"""The least that a launch can cost: a kernel that does nothing."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.machine import nvcc_path

__all__ = ["EmptyLaunch", "empty_launch"]

SOURCE = """
__global__ void empty() {}
extern "C" void launch(void* stream) { empty<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(); }
"""


class EmptyLaunch(NamedTuple):
    launch: Callable[[], Any]
    what: str


def _compiled() -> Callable[[], Any]:
    """Launches on torch's current stream. Raises OSError or CalledProcessError without a working nvcc."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_gpu_") as folder:
        source, library = Path(folder) / "empty.cu", Path(folder) / "empty.so"
        source.write_text(SOURCE)
        flags = [f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler=-fPIC", "-o", str(library)]
        subprocess.run([nvcc_path() or "nvcc", *flags, str(source)], check=True, capture_output=True, timeout=60)
        launch = ctypes.CDLL(str(library)).launch  # stays mapped when the folder is gone
    launch.argtypes, launch.restype = [ctypes.c_void_p], None
    return lambda: launch(torch.cuda.current_stream().cuda_stream)


@functools.cache
def empty_launch(device: torch.device) -> EmptyLaunch:
    if device.type != "cuda":
        return EmptyLaunch(lambda: None, "a call of nothing")
    try:
        return EmptyLaunch(_compiled(), "a kernel without a body")
    except (OSError, subprocess.SubprocessError) as error:
        x = torch.zeros(1, device=device)
        return EmptyLaunch(lambda: x.fill_(1.0), f"torch's fill_ of one element, for want of a compiler ({error})")
