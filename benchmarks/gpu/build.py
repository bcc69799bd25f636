"""The extension, built in place for this card's architecture alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from benchmarks.gpu.context import ROOT, Context, cores
from benchmarks.gpu.part import tail

__all__ = ["environment", "measure"]

COMMAND = ("setup.py", "build_ext", "--inplace")


def environment(capability: tuple[int, int], jobs: int) -> dict[str, str]:
    """What setup.py is told: CUDA or an error, one architecture, a compiler a core."""
    return {
        "DDPM_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{capability[0]}.{capability[1]}",
        "MAX_JOBS": str(jobs),
    }


def measure(context: Context) -> None:
    capability = (9, 0)
    if not context.dry:
        import torch

        capability = torch.cuda.get_device_capability()
    told = environment(capability, cores())
    context.results |= {"command": f"python {' '.join(COMMAND)}", "environment": told}
    if context.dry:
        return
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *COMMAND],
        cwd=ROOT,
        env=os.environ | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    context.results["seconds"] = round(time.monotonic() - started, 1)
    if done.returncode != 0:
        raise RuntimeError("the build failed:\n" + "\n".join(tail(done.stdout)))
    # asked of a fresh process: that it loads is part of what is checked
    question = "import ddpm_ext, json; print(json.dumps(ddpm_ext.build_info()))"
    loaded = subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True, text=True)
    if loaded.returncode != 0:
        raise RuntimeError("the built module does not load:\n" + "\n".join(tail(loaded.stderr)))
    context.results["build_info"] = json.loads(loaded.stdout.splitlines()[-1])
