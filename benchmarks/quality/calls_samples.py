"""Draws shapes in few calls of the model by tuned tables, and above them 1,000 calls of DDPM, from the same noise.

python benchmarks/quality/calls_samples.py --out benchmarks/results/shapes.png
"""

from __future__ import annotations

import argparse

import torch
from drawn import draw

from ddpm_ext import plots
from ddpm_ext.models.folder import load_model

GUIDANCE, SEED, CALLS = 2.5, 2, (10, 6, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/shapes.png", help="the picture (default: build/shapes.png)")
    options = parser.parse_args()
    model = load_model("shapes")
    loops = [{"sampler": "ddpm"}, *({"sampler": model.tuned(calls, GUIDANCE)} for calls in CALLS)]
    rows = [draw(model, range(10), 10, SEED, GUIDANCE, **loop) for loop in loops]
    title = f"1,000 calls of DDPM, and tuned tables in {', '.join(map(str, CALLS[:-1]))} and {CALLS[-1]} calls"
    assert model.classes is not None
    plots.save_strips(list(torch.stack(rows, 1)), model.classes.names, title, options.out)


if __name__ == "__main__":
    main()
