"""Builds the extension in place, for this card's architecture alone, and loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import torch

from benchmarks.gpu.parts import ROOT


def main() -> None:
    major, minor = torch.cuda.get_device_capability()
    # setup.py then builds with CUDA or fails, for one architecture, with a compiler a core.
    added = {"DDPM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(os.cpu_count())}
    started = time.monotonic()
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=os.environ | added, check=True)
    print(json.dumps({"seconds": round(time.monotonic() - started, 1), **added}), flush=True)
    check = "import ddpm_ext, json; print(json.dumps(ddpm_ext.build_info()))"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
