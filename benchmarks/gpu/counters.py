"""The timed operations of ddpm_ext, each called once, for Nsight Compute to look at their kernels.

Prints a row of JSON for each call, which launches one kernel of ddpm_ext.
"""

from __future__ import annotations

import json
import sys

from benchmarks.gpu.speed import BF16, F32, Bench
from benchmarks.gpu.ways import REST, STEPS, WITH_HISTORY


def main() -> None:
    bench = Bench(dry="--dry" in sys.argv)
    shape = bench.shapes[0]
    for pair in ((F32, F32), (BF16, BF16)):
        for way in (STEPS[0], *WITH_HISTORY, *REST):
            (b,) = bench.batches(1, way, shape, pair)
            print(json.dumps(bench.about(way, shape, pair)), flush=True)
            way.call(b)


if __name__ == "__main__":
    main()
