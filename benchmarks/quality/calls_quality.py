"""Quality against calls of the model: tuned tables beside named samplers, on both shipped models, drawn and as a table.

    python benchmarks/quality/calls_quality.py --keep build/calls --table build/calls.md --plot build/calls.png

A number is the Fréchet distance (Heusel et al. 2017) of samples in the hidden units of a small classifier, 0 for the
same distribution: for digits to the images that the model was trained on; for shapes, which are drawn with a guidance
of 2.5 and so are not distributed as images are, to a loop of 100 steps. All loops have the same starting noise. Samples
are kept in a folder, and a later run draws only those that are missing.
"""

from __future__ import annotations

import argparse
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn import draw, kept
from sampler_quality import Features, frechet, pixels
from shapes_quality import train_classifier
from torch import Tensor

from ddpm_ext.base.files import write_text
from ddpm_ext.base.optional import require
from ddpm_ext.models.folder import load_model
from ddpm_ext.plots.style import line_style, new_figure
from ddpm_ext.training.data import digits

Cells = dict[str, dict[int, float]]  # the distance by a curve's name and the calls of the model
TUNED, EVERY_STEP = (4, 6, 8, 10), 1000
NAMED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("unipc", (4, 6, 8, 10, 15, 20)),
    ("dpmpp_2m", (4, 6, 8, 10, 15, 20)),
    ("ddim", (4, 6, 8, 10, 15, 20)),
    ("ddpm", (EVERY_STEP,)),
)
# By any spacing, as `ddpm-ext tune` found them.
BEST: dict[str, dict[int, dict[str, Any]]] = {
    "digits": {
        4: {"sampler": "unipc", "spacing": "align_your_steps_sdxl"},
        **{key: {"sampler": "dpm_solver_2m", "spacing": "quadratic"} for key in (6, 8, 10)},
    },
    "shapes": {key: {"sampler": "unipc", "spacing": "beta"} for key in TUNED},
}
IMAGES = "as many images"  # as a curve's name, of 0 calls: how far images are that were drawn from the training set
DRAWS = 3
MANY_STEPS = {"sampler": "deis", "steps": 100, "spacing": "linspace"}
GUIDANCE = {"digits": None, "shapes": 2.5}
REFERENCES = {"digits": "images", "shapes": "100 steps"}
SEED = 11  # none that tables were tuned with


@functools.cache
def of_digits() -> tuple[Features, Any]:
    """The features, and those of the training digits."""
    features = Features()
    return features, features(pixels(digits("train")[0]))


def distance_of(name: str, many_steps: Callable[[], Tensor]) -> Callable[[Tensor], float]:
    """The Fréchet distance of a model's samples to the reference. many_steps: draws samples of 100 steps."""
    if name == "digits":
        features, real = of_digits()
        return lambda samples: frechet(features(pixels(samples)), real)
    network = train_classifier()

    @torch.no_grad()
    def units(images: Tensor) -> Any:
        return torch.cat([network.features(part) for part in images.split(500)]).double().numpy()

    reference = units(many_steps())
    return lambda samples: frechet(units(samples), reference)


def of_images(count: int) -> float:
    """The mean distance of `count` training digits, drawn with replacement, to all: what a perfect model has."""
    _, real = of_digits()
    draws = (np.random.default_rng(seed).integers(len(real), size=count) for seed in range(DRAWS))
    return sum(frechet(real[draw], real) for draw in draws) / DRAWS


def measure(name: str, options: argparse.Namespace) -> Cells:
    model, batch = load_model(name), 500 if name == "digits" else 100

    def samples_of(file: str, loop: dict[str, Any]) -> Tensor:
        path = options.keep / name / f"{file}.npy"
        return kept(path, lambda ids: draw(model, ids, batch, SEED, GUIDANCE[name], **loop), options.num, batch)

    distance = distance_of(name, lambda: samples_of("deis, 100", MANY_STEPS))
    cells: Cells = {IMAGES: {0: of_images(options.num)}} if name == "digits" else {}
    loops = [(f"tuned, {calls}", "tuned", calls, {"sampler": model.tuned(calls, GUIDANCE[name])}) for calls in TUNED]
    loops += [(f"best name, {c}", "best name", c, {"steps": c, **loop}) for c, loop in BEST[name].items()]
    loops += [
        (f"{sampler}, {calls}", sampler, calls, {"sampler": sampler, "steps": calls})
        for sampler, every in NAMED
        for calls in every
    ]
    for file, curve, calls, loop in loops:
        if options.kept_only and not (options.keep / name / f"{file}.npy").exists():
            continue
        cells.setdefault(curve, {})[calls] = distance(samples_of(file, loop))
        print(f"{name}, {file}: {cells[curve][calls]:.3f}", flush=True)
    return cells


def as_text(found: dict[str, Cells], options: argparse.Namespace) -> str:
    lines = [
        "# Quality against calls of the model",
        "",
        f"Fréchet distance of {options.num:,} samples in a classifier's hidden units: of digits to images, of shapes,",
        "with a guidance of 2.5, to samples of 100 steps of deis. Named samplers have their default spacing, x0 is",
        f"clipped to [-1, 1], and the seed is {SEED}. The best name is the nearest to 100 steps of all samplers by all",
        f"spacings, as ddpm-ext tune finds it. {IMAGES.capitalize()}: training digits drawn with replacement, as by a",
        f"perfect model; the mean of {DRAWS} draws.",
    ]
    for name, cells in found.items():
        columns = sorted({calls for own in cells.values() for calls in own})
        lines += ["", f"## {name}", "", f"| sampler | {' | '.join(f'{calls:,} calls' for calls in columns)} |"]
        lines.append("|---" + "|---:" * len(columns) + "|")
        for curve, own in cells.items():
            shown = (f"{own[calls]:.3f}" if calls in own else "" for calls in columns)
            lines.append(f"| {curve} | {' | '.join(shown)} |")
    machine = f"torch {torch.__version__} on {platform.machine()}, {torch.get_num_threads()} threads"
    return "\n".join([*lines, "", f"`python benchmarks/quality/calls_quality.py`, {machine}", ""])


def plot(found: dict[str, Cells], path: Path) -> None:
    with new_figure(9, 3.9, path, "drawing quality against calls") as figure:
        ticker = require("matplotlib.ticker", "drawing quality against calls")
        ticks = sorted({calls for _, every in NAMED for calls in every if calls < EVERY_STEP})
        every_axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, cells) in zip(every_axes, found.items(), strict=True):
            for number, (curve, own) in enumerate(each for each in cells.items() if each[0] not in ("ddpm", IMAGES)):
                style = line_style(number, len(own)) | ({"linewidth": 3} if curve == "tuned" else {})
                axes.plot(list(own), list(own.values()), label=curve, **style)
            for calls, last in cells.get("ddpm", {}).items():
                axes.axhline(last, color="grey", linestyle=":", label=f"ddpm, {calls:,} calls")
            for floor in cells.get(IMAGES, {}).values():
                axes.axhline(floor, color="black", linewidth=1, label=IMAGES)
            guidance = GUIDANCE[name]
            title = name if guidance is None else f"{name}, guidance {guidance:g}"
            axes.set(title=title, xlabel="calls of the model", ylabel=f"Fréchet distance to {REFERENCES[name]}")
            axes.set_yscale("log")
            axes.set_xticks(ticks, map(str, ticks))
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        handles = every_axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=4, fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GUIDANCE), choices=list(GUIDANCE))
    parser.add_argument("--num", type=int, default=2000, help="samples for each number (default: 2000)")
    parser.add_argument("--keep", type=Path, default=Path("build/calls"), help="folder for samples")
    parser.add_argument("--kept-only", action="store_true", help="leave out what would have to be drawn")
    parser.add_argument("--table", type=Path, help="also write the table there")
    parser.add_argument("--plot", type=Path, help="also draw the figure there")
    options = parser.parse_args()
    found = {name: measure(name, options) for name in options.models}
    text = as_text(found, options)
    print(text)
    if options.table:
        write_text(options.table, text)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
