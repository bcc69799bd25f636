"""Builds the extension in place, for this card's architecture alone, and loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import torch

from benchmarks.gpu.parts import ROOT, tool


def main() -> None:
    major, minor = torch.cuda.get_device_capability()
    # setup.py then builds with CUDA or fails, for one architecture, with a compiler a core.
    added = {"DDPM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(os.cpu_count())}
    if nvcc := tool("nvcc"):  # which may lie in a toolkit that is not on PATH
        added["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(nvcc)])
    started = time.monotonic()
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=os.environ | added, check=True)
    took = {"seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(took | {name: value for name, value in added.items() if name != "PATH"}), flush=True)
    check = "import ddpm_ext, json; print(json.dumps(ddpm_ext.build_info()))"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
