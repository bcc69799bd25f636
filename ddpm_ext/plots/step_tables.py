"""The columns of step tables as a figure: of one table, or of several over one another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ddpm_ext.base import checks
from ddpm_ext.base.optional import require
from ddpm_ext.plots.style import Array, PathLike, line_style, new_figure, plural, to_array
from ddpm_ext.tables.step_table import StepTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["step_table_figure"]

_LINEAR_UP_TO = 10  # an axis with larger factors is logarithmic, but linear around 0


def step_table_figure(
    tables: StepTable | Mapping[str, StepTable], path: PathLike | None = None, *, against: str = "step"
) -> Figure:
    """Draws the columns of one step table, or of several over one another, over the steps of the loop.

    Of one table, the factors of the predicted x0 share a panel, and so do those of the next sample; the standard
    deviation of the noise and the timestep have a panel each. Of several tables, each column has a panel and each table
    a line; columns that are 0 in all tables are left out. An axis with factors above 10 is logarithmic, but linear
    around 0. c3 is drawn unless it is all 0. The columns for draws, learned variances and gradients are not drawn.

    Args:
        tables: a StepTable, or several by the names that the legend shows.
        path: where the figure is written as well; the ending names the format.
        against: the horizontal axis. "step" is the number of the row; "timestep", which falls from left to right, suits
            tables with different numbers of rows.

    Raises:
        TypeError: `tables` is neither a StepTable nor a mapping of them.
        ValueError: there are no tables, or `against` is unknown.
        OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.
    """
    checks.one_of("against", against, ("step", "timestep"))
    if isinstance(tables, StepTable):
        return _one_table(tables, path, against)
    if not isinstance(tables, Mapping):
        raise TypeError(f"tables is a {type(tables).__name__}, expected a StepTable or several by name")
    if not tables:
        raise ValueError("tables: got none, expected at least 1")
    for name, table in tables.items():
        if not isinstance(table, StepTable):
            raise TypeError(f"tables[{name!r}] is a {type(table).__name__}, expected a StepTable")
    return _several_tables(tables, path, against)


def _column(table: StepTable, name: str) -> Array:
    """A column of the table by its name; "step" is the numbers of the rows."""
    if name == "step":
        return np.arange(len(table), dtype=np.float64)
    return to_array(getattr(table, name))


def _learned(table: StepTable) -> bool:
    return bool(_column(table, "l0").any() or _column(table, "l1").any())


_SPREAD = "standard deviation\n(units of the sample)"


def _one_table(table: StepTable, path: PathLike | None, against: str) -> Figure:
    history = bool(_column(table, "c3").any())
    noise = "s exp(l0 + l1 v)" if _learned(table) else "s"
    following = f"c0 x0 + c1 x + c2 m{chr(10) + '+ c3 h' if history else ''} + {'s z' if noise == 's' else 'noise'}"
    panels: list[tuple[str, tuple[str, ...], str]] = [
        ("predicted x0 = clip(a x + b m)", ("a", "b"), "factor (no unit)"),
        (f"next sample = {following}", ("c0", "c1", "c2", "c3") if history else ("c0", "c1", "c2"), "factor (no unit)"),
        (f"noise of the step, {noise} z", ("s",), _SPREAD if noise == "s" else "s\n(factor of the learned deviation)"),
        (_TITLES[_other(against)], (_other(against),), _LABELS[_other(against)]),
    ]
    x = _column(table, against)
    with new_figure(9, 5.6, path, "drawing a StepTable") as figure:
        for axes, (title, names, label) in zip(_panels(figure, len(panels), against), panels, strict=True):
            for number, name in enumerate(names):
                axes.plot(x, _column(table, name), label=name, **line_style(number, len(table)))
            _finish(axes, title, label, names[0])
            if len(names) > 1:
                axes.legend(ncols=2 if len(names) > 3 else 1)
        figure.suptitle(f"StepTable of {plural(len(table), 'row')}")
    return figure


_TITLES = {
    "a": "a, of x in the predicted x0",
    "b": "b, of the model's output in x0",
    "c0": "c0, of x0 in the next sample",
    "c1": "c1, of x in the next sample",
    "c2": "c2, of the output in the next sample",
    "c3": "c3, of the previous x0 in the next sample",
    "s": "s, of the step's noise",
    "timestep": "timestep that the model receives",
    "step": "step of each timestep",
}
_LABELS = {"timestep": "timestep", "step": "step of the loop"}


def _other(against: str) -> str:
    return "timestep" if against == "step" else "step"


def _several_tables(tables: Mapping[str, StepTable], path: PathLike | None, against: str) -> Figure:
    names = [name for name in _TITLES if name != against]
    drawn = [name for name in names if any(_column(table, name).any() for table in tables.values())] or names[-1:]
    zero = [name for name in ("a", "b", "c0", "c1", "c2", "s") if name not in drawn]
    labels = _LABELS | {"s": "factor of the noise" if any(map(_learned, tables.values())) else _SPREAD}
    rows = math.ceil(len(drawn) / 2)
    with new_figure(9, 0.9 + 2 * rows, path, "drawing step tables") as figure:
        panels = _panels(figure, len(drawn), against)
        for axes, name in zip(panels, drawn, strict=True):
            for number, (label, table) in enumerate(tables.items()):
                axes.plot(_column(table, against), _column(table, name), label=label, **line_style(number, len(table)))
            _finish(axes, _TITLES[name], labels.get(name, "factor (no unit)"), name)
        handles = panels[0].get_legend_handles_labels()
        note = f"0 in all: {', '.join(zero)}" if zero else None
        if len(drawn) % 2:
            figure.axes[-1].legend(*handles, loc="center", title=note)
        else:
            figure.legend(*handles, loc="outside upper center", ncols=min(4, len(tables)), title=note)
    return figure


def _panels(figure: Figure, count: int, against: str) -> list[Axes]:
    """`count` axes in two columns that share the horizontal axis; an odd number leaves a place for the legend."""
    axes = list(figure.subplots(math.ceil(count / 2), 2, sharex=True, squeeze=False).flat)
    for spare in axes[count:]:
        spare.axis("off")
    lowest = axes[:count][-2:]
    for panel in lowest:
        panel.set_xlabel(_LABELS[against])
        panel.tick_params(labelbottom=True)
    axes[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if against == "timestep":
        axes[0].xaxis.set_inverted(True)
    return axes[:count]


def _finish(axes: Axes, title: str, label: str, name: str) -> None:
    largest = max(float(np.abs(line.get_ydata()).max()) for line in axes.lines)
    if largest > _LINEAR_UP_TO and name not in _LABELS:
        ticker = require("matplotlib.ticker", "drawing step tables")
        axes.set_yscale("asinh", linear_width=0.5)
        axes.yaxis.set_major_locator(ticker.SymmetricalLogLocator(base=10, linthresh=1))  # ticks at 0 and powers of ten
    axes.set(title=title, ylabel=label)
