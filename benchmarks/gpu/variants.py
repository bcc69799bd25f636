"""Every kernel once, on small tensors: what compute-sanitizer looks at. As a module, it is run on the GPU."""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.bits import CHECKS, call, cases

__all__ = ["run"]

SHAPES = ((2, 3, 4, 8), (3, 5, 7))  # whole vectors; a tail, and samples at odd addresses


def run(device: torch.device) -> int:
    """How many."""
    count = 0
    for op in CHECKS:
        for case in cases(op, SHAPES):
            if case.fill == "normal":
                call(case, device, case.layout)
                count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count


if __name__ == "__main__":
    print(run(torch.device(sys.argv[1])), "cases")
