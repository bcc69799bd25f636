"""The shared style of all figures: colours, dashes, sizes, and how figures are written.

A figure is a matplotlib Figure, made without pyplot. With a path it is also written to a file, in the format of the
path's ending: .png, .svg or .pdf. The same input gives the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ddpm_ext.base.files import atomic_path
from ddpm_ext.base.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
Values = torch.Tensor | npt.NDArray[np.floating]
PathLike = str | os.PathLike[str]

# The colours of Okabe and Ito, which colour-blind readers can tell apart, with a grey in place of the yellow, which is
# hard to see on white. Dashes and markers tell the lines apart in grey as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#888888")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 2)), (0, (7, 2, 1.5, 2)), (0, (10, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 4)))
_MARKERS = "os^DvPX"
_MOST_MARKERS = 25  # the most markers on a line: with more points, only every second, every third, ... gets a marker
_STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.framealpha": 0.9,
    "svg.hashsalt": "ddpm_ext",
}
# {ending of a file: savefig's metadata, which leaves out the date, and in a .png matplotlib's version}
_WITHOUT_DATE = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@contextmanager
def new_figure(width: float, height: float, path: PathLike | None, purpose: str) -> Iterator[Figure]:
    """Yields a figure of width by height inches to draw on. If the `with` block ends without an error, the figure is
    written to `path`, unless `path` is None.

    Raises:
        MissingExtra: matplotlib is not installed; the message names `purpose`.
        ValueError, OSError: `path` can't be written, or matplotlib doesn't know its ending.
    """
    matplotlib, figures = require("matplotlib", purpose), require("matplotlib.figure", purpose)
    with matplotlib.rc_context(_STYLE):
        # pyplot would keep a reference to the figure and may need a display.
        figure = figures.Figure(figsize=(width, height), dpi=100, layout="constrained")
        yield figure
        if path is not None:
            with atomic_path(path) as temporary:
                figure.savefig(temporary, metadata=_WITHOUT_DATE.get(Path(path).suffix.lower()))


def legend_below(figure: Figure, columns: int) -> None:
    """Adds a legend below the axes, with `columns` columns, or fewer if it would be wider than the figure."""
    for count in range(columns, 0, -1):
        legend = figure.legend(loc="outside lower center", ncols=count)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def line_style(number: int, points: int) -> dict[str, Any]:
    """Arguments of Axes.plot for line `number` of an axis. points: the line's number of points.

    Later lines are thinner, so that a line which they cover stays visible.
    """
    count = len(COLOURS)
    return {
        "color": COLOURS[number % count],
        "linestyle": _DASHES[(number + number // count) % len(_DASHES)],
        "linewidth": max(1.6, 2.6 - 0.35 * number),
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "markerfacecolor": "white",
        "markevery": -(-points // _MOST_MARKERS),
    }


def to_array(values: Values) -> Array:
    """Converts a tensor or an array, on any device and of any dtype, into a float64 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def plural(count: int, noun: str) -> str:
    """The count and the noun, with an "s" unless the count is 1: "1 step", "2 steps"."""
    return f"{count} {noun}{'s' * (count != 1)}"
