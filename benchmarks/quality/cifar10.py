"""Quality of samples of CIFAR-10 against calls of the model: tuned tables beside named samplers, table and chart.

    ddpm-ext tune --model my-run --autocast bfloat16
    python benchmarks/quality/cifar10.py --data cifar10 --model my-run --guidance 1.5 \
        --table build/cifar10.md --plot build/cifar10.png

The folder of --data has train/ and test/, and in each a folder for each class. A number is the Fréchet distance (Heusel
et al. 2017) of samples to the images of test/ in the units of a small classifier that is trained on train/, so it is no
FID. All loops have the same starting noise, and the classes in turn. Samples and the classifier are written to a
folder, and a later run makes only what is missing.
"""

from __future__ import annotations

import argparse
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from drawn import draw, kept
from image_classifier import Classifier, accuracy, train_classifier
from torch import Tensor

from ddpm_ext import StepTable
from ddpm_ext.base.files import write_text
from ddpm_ext.base.optional import require
from ddpm_ext.models.folder import LoadedModel, load_model
from ddpm_ext.models.tuned import FOLDER, table_name
from ddpm_ext.plots.style import line_style, new_figure
from ddpm_ext.training.data import FolderImages
from ddpm_ext.training.score import Moments, frechet, moments

Cells = dict[str, dict[int, tuple[float, ...]]]
"""By a curve's name and the calls of the model: the distances to the images of each part of the data."""
PARTS = ("test", "train")
TUNED = (4, 6, 8, 10)
NAMED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("unipc", (4, 6, 8, 10, 20)),
    ("dpmpp_2m", (4, 6, 8, 10, 20)),
    ("ddim", (6, 10, 20)),
    ("ddpm", (50,)),
)
SEED, BATCH = 11, 64  # a seed that no table was tuned with


@torch.no_grad()
def units(network: Classifier, images: Tensor) -> Tensor:
    return torch.cat([network.units(part) for part in images.split(500)]).double()


def of_folder(network: Classifier, images: FolderImages) -> Tensor:
    return torch.cat([units(network, images.batch(part)) for part in torch.arange(len(images)).split(500)])


def best_name(table: StepTable) -> dict[str, Any]:
    """The loop of the named sampler that ended nearest to many steps when the table was tuned, by the table's notes."""
    match = re.match(r"(\w+) with (\w+)(?:, eta ([\d.]+))?(?:, (\d+) steps)?:", str(table.notes["best name"]))
    assert match is not None
    eta = {} if match[3] is None else {"eta": float(match[3])}
    return {"sampler": match[1], "spacing": match[2], "steps": int(match[4] or table.notes["calls"]), **eta}


def loops(folder: Path, guidance: float | None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Curves, numbers of calls and options of loops. Tables that the model's folder lacks are left out."""
    for calls in TUNED:
        path = folder / FOLDER / table_name(calls, guidance)
        if path.exists():
            table = StepTable.load(path)
            yield "tuned", calls, {"sampler": table}
            yield "best name", calls, best_name(table)
    for sampler, every in NAMED:
        for calls in every:
            yield sampler, calls, {"sampler": sampler, "steps": calls}


def measure(
    model: LoadedModel, network: Classifier, images: dict[str, Moments], guidance: float | None, options: Any
) -> Cells:
    cells: Cells = {}
    for curve, calls, loop in loops(options.model, guidance):
        path = options.keep / title_of(guidance) / f"{curve}, {calls}.npy"
        if options.kept_only and not path.exists():
            continue

        def make(ids: range, loop: Any = loop) -> Tensor:
            return draw(model, ids, BATCH, SEED, guidance, autocast=torch.bfloat16, **loop)

        begun = time.monotonic()
        features = moments(units(network, kept(path, make, options.num, 10 * BATCH)))
        distances = tuple(frechet(features, images[part]) for part in PARTS)
        cells.setdefault(curve, {})[calls] = distances
        shown = ", ".join(f"{distance:.3f}" for distance in distances)
        print(f"{path.parent.name}, {path.stem}: {shown} ({time.monotonic() - begun:.0f} s)", flush=True)
    return cells


def title_of(guidance: float | None) -> str:
    return "without guidance" if guidance is None else f"guidance {guidance:g}"


def as_text(found: dict[float | None, Cells], floor: float, right: float, options: Any) -> str:
    lines = [
        "# CIFAR-10: quality against calls of the model",
        "",
        f"Fréchet distance of {options.num:,} samples to the test images, and in brackets to the training images, in",
        f"the 128 units of a classifier that is right for {right:.1%} of the test images. As many training images have",
        f"a distance of {floor:.3f} to the test images. Seed {SEED}. Named samplers have their default spacing; the",
        "best name is the nearest to 100 steps of all samplers by all spacings, as ddpm-ext tune finds it.",
    ]
    for guidance, cells in found.items():
        columns = sorted({calls for row in cells.values() for calls in row})
        lines += ["", f"## {title_of(guidance)}", "", f"| sampler | {' | '.join(f'{n} calls' for n in columns)} |"]
        lines.append("|---" + "|---:" * len(columns) + "|")
        for curve, row in cells.items():
            shown = ("{:.3f} ({:.3f})".format(*row[calls]) if calls in row else "" for calls in columns)
            lines.append(f"| {curve} | {' | '.join(shown)} |")
    machine = f"torch {torch.__version__} on {platform.machine()}, {torch.get_num_threads()} threads, bfloat16"
    return "\n".join([*lines, "", f"`python benchmarks/quality/cifar10.py`, {machine}", ""])


def plot(found: dict[float | None, Cells], floor: float, path: Path) -> None:
    with new_figure(max(6.5, 4.5 * len(found)), 3.9, path, "drawing quality against calls") as figure:
        ticker = require("matplotlib.ticker", "drawing quality against calls")
        every_axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
        for axes, (guidance, cells) in zip(every_axes, found.items(), strict=True):
            for number, (curve, row) in enumerate(cells.items()):
                style = line_style(number, len(row)) | ({"linewidth": 3} if curve == "tuned" else {})
                axes.plot(list(row), [distance for distance, _ in row.values()], label=curve, **style)
            axes.axhline(floor, color="grey", linestyle=":", label="training images")
            axes.set(title=title_of(guidance), xlabel="calls of the model")
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis, subs in ((axes.xaxis, (1, 2, 4, 6, 8)), (axes.yaxis, (1, 2, 5))):
                axis.set_major_locator(ticker.LogLocator(subs=subs))
                axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(ticker.NullFormatter())
        every_axes[0].set_ylabel("Fréchet distance to the test images")
        handles = every_axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=4, fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10, with train/ and test/")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, with tuned tables in tuned/")
    parser.add_argument("--guidance", type=float, nargs="*", default=[], help="scales to measure beside none")
    parser.add_argument("--num", type=int, default=5000, help="samples for each number (default: 5000)")
    parser.add_argument("--keep", type=Path, default=Path("build/cifar10"), help="folder for samples and classifier")
    parser.add_argument("--kept-only", action="store_true", help="leave out what would have to be drawn")
    parser.add_argument("--table", type=Path, help="also write the table there")
    parser.add_argument("--plot", type=Path, help="also draw the chart there")
    options = parser.parse_args()
    images = {part: FolderImages(options.data / part) for part in PARTS}
    network = train_classifier(images["train"], options.keep / "classifier.pt")
    right = accuracy(network, images["test"])
    features = {part: of_folder(network, images[part]) for part in PARTS}
    references = {part: moments(features[part]) for part in PARTS}
    as_many = torch.arange(options.num) * len(features["train"]) // options.num  # evenly, of all classes
    floor = frechet(moments(features["train"][as_many]), references["test"])
    print(f"classifier: {right:.1%} right of the test images; training images to test images: {floor:.3f}", flush=True)
    model = load_model(options.model)
    found = {scale: measure(model, network, references, scale, options) for scale in (None, *options.guidance)}
    text = as_text(found, floor, right, options)
    print(text)
    if options.table:
        write_text(options.table, text)
    if options.plot:
        plot(found, floor, options.plot)


if __name__ == "__main__":
    main()
