"""Draws samples of each class, a row for each sampler and number of calls of the model, from the same noise.

python benchmarks/quality/calls_samples.py --out benchmarks/results/shapes.png
python benchmarks/quality/calls_samples.py --model my-run --guidance 2 --rows ddpm:1000 unipc:6 --out classes.png
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from drawn import draw

from ddpm_ext import plots
from ddpm_ext.models.folder import LoadedModel, load_model


def loop_of(row: str, model: LoadedModel, guidance: float) -> dict[str, Any]:
    """The loop of "sampler:calls"; of "tuned:calls" that with the model's table for this guidance."""
    sampler, calls = row.split(":")
    if sampler == "tuned":
        return {"sampler": model.tuned(int(calls), guidance)}
    return {"sampler": sampler, "steps": int(calls)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help='"shapes" or a folder (default: shapes)')
    parser.add_argument("--guidance", type=float, default=2.5, help="(default: 2.5)")
    rows = ["ddpm:1000", "unipc:100", "tuned:4", "unipc:4", "dpmpp_2m:4"]
    parser.add_argument("--rows", nargs="+", default=rows, metavar="SAMPLER:CALLS")
    parser.add_argument("--seed", type=int, default=5, help="(default: 5)")
    parser.add_argument("--out", default="build/shapes.png", help="the picture (default: build/shapes.png)")
    options = parser.parse_args()
    model = load_model(options.model)
    assert model.classes is not None
    names = model.classes.names
    loops = [loop_of(row, model, options.guidance) for row in options.rows]
    rows = [draw(model, range(len(names)), len(names), options.seed, options.guidance, **loop) for loop in loops]
    labels = [f"{sampler}, {int(calls):,} calls" for sampler, calls in (row.split(":") for row in options.rows)]
    plots.save_strips(list(torch.stack(rows, 1)), names, "from the same noise", options.out, names=labels)


if __name__ == "__main__":
    main()
