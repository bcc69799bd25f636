"""Quality against calls of the model: tuned tables beside named samplers, on both shipped models, drawn and as a table.

    python benchmarks/quality/calls_quality.py --keep build/calls --table build/calls.md --plot build/calls.png

A number is the Fréchet distance (Heusel et al. 2017) between samples and images that the model was not trained on, or
for digits those that it was trained on, in the hidden units of a small classifier: 0 for the same distribution. All
have the same starting noise. Shapes are drawn with a guidance of 2.5. Samples are kept in a folder, and a later run
draws only those that are missing.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampler_quality import Features, frechet, pixels
from shapes_quality import OF_REFERENCE, train_classifier
from torch import Tensor

from ddpm_ext import Philox
from ddpm_ext.base.files import atomic_path, write_text
from ddpm_ext.models.folder import LoadedModel, load_model
from ddpm_ext.plots.style import line_style, new_figure
from ddpm_ext.training.data import Shapes, digits

Cells = dict[str, dict[int, float]]  # the distance by a curve's name and the calls of the model
TUNED, EVERY_STEP = (4, 6, 8, 10), 1000
NAMED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("unipc", (4, 6, 8, 10, 15, 20)),
    ("dpmpp_2m", (4, 6, 8, 10, 15, 20)),
    ("ddim", (4, 6, 8, 10, 15, 20)),
    ("ddpm", (EVERY_STEP,)),
)
GUIDANCE = {"digits": None, "shapes": 2.5}
SEED = 11  # none that tables were tuned with


@torch.no_grad()
def draw(model: LoadedModel, guidance: float | None, count: int, batch: int, **loop: Any) -> Tensor:
    """Samples (count, ...), of all classes in turn."""
    diffusion, parts = model.settings.diffusion(), []
    for first in range(0, count, batch):
        ids = range(first, min(first + batch, count))
        if model.classes is not None:
            loop["model_kwargs"] = model.classes.model_kwargs(ids, guided=guidance is not None)
        parts.append(
            diffusion.p_sample_loop(
                model.unet,
                (len(ids), *model.shape),
                guidance=guidance,
                rng=Philox(SEED, sample_ids=first),
                record="last",
                progress=False,
                **loop,
            )
        )
    return torch.cat(parts).clamp(-1, 1)  # type: ignore[arg-type]


def kept(path: Path, make: Callable[[], Tensor], count: int) -> Tensor:
    """The samples at a path, which are made where there are not as many."""
    if path.exists() and len(found := np.load(path)) >= count:
        return torch.from_numpy(found[:count])
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as beside, open(beside, "wb") as opened:
        np.save(opened, made.numpy())
    return made


def distance_to_data(name: str, count: int) -> Callable[[Tensor], float]:
    """The Fréchet distance of samples to the model's data."""
    if name == "digits":
        features = Features()
        real = features(pixels(digits("train")[0]))
        return lambda samples: frechet(features(pixels(samples)), real)
    network = train_classifier()

    def units(images: Tensor) -> Any:
        return torch.cat([network.features(part) for part in images.split(500)]).double().numpy()

    drawn = units(Shapes(16, OF_REFERENCE).batch(torch.arange(count)))
    return lambda samples: frechet(units(samples), drawn)


def measure(name: str, options: argparse.Namespace) -> Cells:
    model, distance = load_model(name), distance_to_data(name, options.num)
    batch = 500 if name == "digits" else 100
    cells: Cells = {}
    loops = [(f"tuned, {calls}", "tuned", calls, {"sampler": model.tuned(calls, GUIDANCE[name])}) for calls in TUNED]
    loops += [
        (f"{sampler}, {calls}", sampler, calls, {"sampler": sampler, "steps": calls})
        for sampler, every in NAMED
        for calls in every
    ]
    for file, curve, calls, loop in loops:
        path = options.keep / name / f"{file}.npy"
        if options.kept_only and not path.exists():
            continue
        samples = kept(path, lambda loop=loop: draw(model, GUIDANCE[name], options.num, batch, **loop), options.num)
        cells.setdefault(curve, {})[calls] = distance(samples)
        print(f"{name}, {file}: {cells[curve][calls]:.3f}", flush=True)
    return cells


def as_text(found: dict[str, Cells], options: argparse.Namespace) -> str:
    lines = [
        "# Quality against calls of the model",
        "",
        f"Fréchet distance of {options.num:,} samples to images, in a classifier's hidden units; seed {SEED}, x0",
        "clipped to [-1, 1], named samplers with their default spacing, shapes with a guidance of 2.5.",
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
    with new_figure(9, 3.8, path, "drawing quality against calls") as figure:
        for axes, (name, cells) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            for number, (curve, own) in enumerate(each for each in cells.items() if each[0] != "ddpm"):
                style = line_style(number, len(own)) | ({"linewidth": 3} if curve == "tuned" else {})
                axes.plot(list(own), list(own.values()), label=curve, **style)
            for calls, last in cells.get("ddpm", {}).items():
                axes.axhline(last, color="grey", linestyle=":", label=f"ddpm, {calls:,} calls")
            guidance = GUIDANCE[name]
            title = name if guidance is None else f"{name}, guidance {guidance:g}"
            axes.set(title=title, xlabel="calls of the model", ylabel="Fréchet distance to images", yscale="log")
            axes.legend(fontsize="small")


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
