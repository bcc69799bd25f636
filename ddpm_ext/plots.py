"""Pictures of samples: grids, labelled strips of a trajectory, GIFs; a curve of losses; and a StepTable's columns.

Images are numpy arrays or tensors (batch, channels, height, width) in [-1, 1], with 1 channel (grey) or 3 (colour).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ddpm_ext.extras import require
from ddpm_ext.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from ddpm_ext.step_table import StepTable

__all__ = [
    "grid",
    "save_gif",
    "save_grid",
    "save_loss_curve",
    "save_picture",
    "save_strips",
    "step_table_figure",
    "strips",
    "to_uint8",
]

Pixels = npt.NDArray[np.uint8]

_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_BETWEEN = (88, 104, 136)  # neither black nor white, which digits are made of
_GAP = 4
_VISIBLE = 64  # small images are enlarged to about this many pixels a side
# Of Okabe and Ito's colours for all eyes those that print well on white; the dashes tell them apart in grey.
_LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))
_FEW = 60  # steps up to which each is marked


def to_uint8(images: torch.Tensor | npt.NDArray[np.floating]) -> Pixels:
    """(batch, channels, height, width) in [-1, 1] to (batch, height, width, channels) uint8.

    Values outside are clipped, and fractions dropped, as guided-diffusion's scripts do. NaN becomes 0.
    """
    pixels = torch.as_tensor(images)
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(
            f"images: got {pixels.dtype} of shape {tuple(pixels.shape)}, "
            "expected floating point of shape (batch, channels, height, width)"
        )
    scaled = ((pixels.detach().cpu().float() + 1) * 127.5).nan_to_num_(0.0).clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _enlarged(images: Pixels, scale: int | None) -> Pixels:
    """RGB, each pixel a square of `scale` pixels; None: as many as make small images visible."""
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images: got {channels} channels, expected 1 or 3 for a picture")
    if scale is None:
        scale = max(1, round(_VISIBLE / max(height, width)))
    coloured = np.broadcast_to(images, (count, height, width, 3))
    return coloured.repeat(scale, axis=1).repeat(scale, axis=2)


def grid(images: Pixels, *, columns: int | None = None, scale: int | None = None) -> Pixels:
    """Puts (count, height, width, channels) uint8 into one picture, (height, width, 3) uint8, row by row.

    `columns`: None makes it about square. `scale`: enlarged that many times, without smoothing; None chooses.
    """
    if not len(images):
        raise ValueError("images: got none, expected at least 1")
    large = _enlarged(images, scale)
    count, height, width, _ = large.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    picture = np.full(shape, _BETWEEN, np.uint8)
    for index, image in enumerate(large):
        top, left = (_GAP + (index // columns) * (height + _GAP), _GAP + (index % columns) * (width + _GAP))
        picture[top : top + height, left : left + width] = image
    return picture


def strips(images: Sequence[Pixels], labels: Sequence[str], title: str, *, scale: int | None = None) -> Pixels:
    """One row a sample, one column a moment, labelled above.

    `images`: for each moment (samples, height, width, channels) uint8. Returns (height, width, 3) uint8.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"labels: got {len(labels)} for {len(images)} moments, expected as many, at least 1")
    moments, samples = len(images), len(images[0])
    by_row = np.stack(images, axis=1).reshape(moments * samples, *images[0].shape[1:])
    body = grid(by_row, columns=moments, scale=scale)
    image = require("PIL.Image", "drawing")
    draw, font = require("PIL.ImageDraw", "drawing"), require("PIL.ImageFont", "drawing")
    large, small = font.load_default(size=18), font.load_default(size=13)
    head = 56
    picture = image.new("RGB", (body.shape[1], body.shape[0] + head), _PAPER)
    picture.paste(image.fromarray(body), (0, head))
    pen = draw.Draw(picture)
    pen.text((_GAP + 2, 6), title, fill=_INK, font=large)
    pitch = (body.shape[1] - _GAP) / moments
    for column, label in enumerate(labels):
        pen.text((_GAP + pitch * (column + 0.5), head - 4), label, fill=_INK, font=small, anchor="ms")
    return np.asarray(picture)


def save_picture(picture: Pixels, path: str | os.PathLike[str]) -> None:
    """Writes (height, width, 3) uint8 to `path`, atomically; the ending says in which format."""
    image = require("PIL.Image", "writing pictures").fromarray(picture)
    with atomic_path(path) as beside:
        image.save(beside)


def save_grid(
    images: torch.Tensor | npt.NDArray[np.floating],
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> None:
    """Writes images (batch, channels, height, width) in [-1, 1] as one picture."""
    save_picture(grid(to_uint8(images), columns=columns, scale=scale), path)


def save_strips(
    images: Sequence[torch.Tensor | npt.NDArray[np.floating]],
    labels: Sequence[str],
    title: str,
    path: str | os.PathLike[str],
    *,
    scale: int | None = None,
) -> None:
    """Writes moments, each (samples, channels, height, width) in [-1, 1], as one labelled picture."""
    save_picture(strips([to_uint8(moment) for moment in images], labels, title, scale=scale), path)


def save_gif(frames: Sequence[Pixels], path: str | os.PathLike[str], *, seconds: float = 6.0) -> None:
    """Writes frames, (height, width, 3) uint8 each, as a GIF without end; the last frame stays for two seconds."""
    if not frames:
        raise ValueError("frames: got none, expected at least 1")
    fromarray = require("PIL.Image", "writing GIFs").fromarray
    pictures: list[Image.Image] = [fromarray(frame) for frame in frames]
    each = max(20, round(1000 * seconds / len(pictures)))  # viewers slow down frames that are shorter
    durations = [each] * (len(pictures) - 1) + [2000]
    with atomic_path(path) as beside:
        pictures[0].save(
            beside, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
        )


def save_loss_curve(losses: Sequence[float], path: str | os.PathLike[str]) -> None:
    """Draws losses, one a step, and their mean over a hundredth of the run, both axes logarithmic."""
    if not len(losses):
        raise ValueError("losses: got none, expected at least 1")
    figures = require("matplotlib.figure", "the curve of losses")
    values = np.asarray(losses, dtype=np.float64)
    window = max(1, len(values) // 100)
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    figure = figures.Figure(figsize=(7, 4), dpi=120, layout="constrained")  # no pyplot: no display
    axes = figure.subplots()
    axes.loglog(np.arange(1, len(values) + 1), values, color="0.8", linewidth=0.6, label="each step")
    axes.loglog(np.arange(window, len(values) + 1), means, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", title="Mean squared error of the predicted noise")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    with atomic_path(path) as beside:
        figure.savefig(beside)


def step_table_figure(table: StepTable, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws a table's columns over its steps, and writes the picture to `path` where one is given.

    Four panels: the factors of the predicted x0, those of the next sample, the noise's standard deviation, and the
    timestep. The factors' axes are logarithmic, but linear around 0, where they go past 10.
    """
    figures = require("matplotlib.figure", "drawing a StepTable")
    figure = figures.Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    panels = {
        "predicted x0 = clip(a x + b m)": (("a", "b"), "factor (no unit)"),
        "next sample = c0 x0 + c1 x + c2 m + s z": (("c0", "c1", "c2"), "factor (no unit)"),
        "noise of the step, s z": (("s",), "standard deviation\n(units of the sample)"),
        "what the model is told": (("timestep",), "timestep"),
    }
    rows = np.arange(len(table))
    for axes, (title, (names, label)) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        largest = 0.0
        for name, (color, dashes) in zip(names, _LINES, strict=False):
            values = getattr(table, name).cpu().numpy()
            largest = max(largest, float(np.abs(values).max()))
            axes.plot(rows, values, dashes, color=color, marker="." if len(rows) <= _FEW else "", label=name)
        if largest > 10 and "timestep" not in names:
            axes.set_yscale("asinh", linear_width=1)
        axes.set(title=title, ylabel=label)
        axes.grid(True, alpha=0.3)
        if len(names) > 1:
            axes.legend()
    for axes in figure.axes[2:]:
        axes.set_xlabel("step of the loop")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(f"StepTable of {len(table)} row{'s' * (len(table) != 1)}")
    if path is not None:
        with atomic_path(path) as beside:
            figure.savefig(beside)
    return figure
