"""The columns of one step table, or of several in the same panels, as a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddpm_ext.base import checks
from ddpm_ext.base.optional import require
from ddpm_ext.plots.style import Array, PathLike, line_style, new_figure, plural, to_array
from ddpm_ext.tables.step_table import StepTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_IN_LINE = 6  # the most terms in a line of a legend
_LINEAR_UP_TO = 10  # an axis with factors above this is logarithmic, but linear around 0


def step_table_figure(
    tables: StepTable | Mapping[str, StepTable],
    path: PathLike | None = None,
    *,
    against: str = "step",
    panels: str = "columns",
) -> Figure:
    """Draws the columns of one step table, or of several in the same panels, over the steps of the loop.

    A single table has panels for the factors of the predicted x0, the factors of the next sample, the timestep (the
    step, if `against` is "timestep"), the standard deviation of the noise (if there is noise), and the factors of the
    history (two panels, if there is a history). Several tables have a panel for each column, with a line for each
    table. Columns that are 0 in all tables are left out, except a and b of a single table. An axis with factors above
    10 is logarithmic, but linear around 0. The columns for draws, levels, learned variances and gradients are not
    drawn.

    Args:
        tables: a StepTable, or tables by their names. The legend shows the names. A single table's name is the title.
        path: if not None, the figure is also written to this file. The ending determines the format.
        against: the horizontal axis. "step" is the number of the row. "timestep", which falls from left to right, suits
            tables with different numbers of rows.
        panels: "columns" gives the panels above. "tables", for tables by their names, gives one for each table, with
            the factors of the next sample.

    Raises:
        TypeError: `tables` is neither a StepTable nor a mapping of StepTables.
        ValueError: there are no tables, `against` or `panels` is unknown, or `path` is a folder or has an unknown
            ending.
        OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> columns = {"timestep": [500, 0], "a": [2, 1], "b": [-1.5, 0], "c0": [0.9, 1], "c1": [0.1, 0]}
        >>> figure = plots.step_table_figure({"mine": StepTable(**columns)}, "table.png")
    """
    checks.one_of("against", against, ("step", "timestep"))
    checks.one_of("panels", panels, ("columns", "tables"))
    if isinstance(tables, StepTable):
        return _one_table("StepTable", tables, path, against)
    if not isinstance(tables, Mapping):
        raise TypeError(f"tables is a {type(tables).__name__}, expected a StepTable or several by name")
    if not tables:
        raise ValueError("tables: got none, expected at least 1")
    for name, table in tables.items():
        if not isinstance(table, StepTable):
            raise TypeError(f"tables[{name!r}] is a {type(table).__name__}, expected a StepTable")
    if len(tables) == 1 and panels == "columns":
        return _one_table(*next(iter(tables.items())), path, against)
    return (_several_tables if panels == "columns" else _side_by_side)(tables, path, against)


def _column(table: StepTable, name: str) -> Array:
    """The table's column with this name, float64; "step" stands for the numbers of the rows."""
    if name == "step":
        return np.arange(len(table), dtype=np.float64)
    return to_array(getattr(table, name))


def _learned(table: StepTable) -> bool:
    return bool(_column(table, "l0").any() or _column(table, "l1").any())


_DEVIATION_LABEL = "standard deviation\n(units of the sample)"


# {column: the symbol that the column is a factor of}, in the next sample and in the tensor kept for later rows. x0 is
# the predicted clean sample, x the sample, m the model's output and z the noise; _MEANINGS explains the others.
_SAMPLE_TERMS = {"c0": "x0", "c1": "x", "c2": "m", "s": "z", "h1": "H1", "h2": "H2", "h3": "H3", "cu": "u"}
_HISTORY_TERMS = {"k0": "x0", "k1": "x", "k2": "m"}
_MEANINGS = {
    "cu": "u: unconditional output",
    "h1": "H1: kept by the row before",
    "h2": "H2: two rows before",
    "h3": "H3: three",
}


def _sum(names: Sequence[str]) -> str:
    return " + ".join(f"{name} {(_SAMPLE_TERMS | _HISTORY_TERMS)[name]}" for name in names)


def _explained(names: Sequence[str]) -> str:
    """A line that explains the symbols u, H1, H2 and H3 of these columns' terms, or "" if there are none."""
    meanings = ", ".join(_MEANINGS[name] for name in names if name in _MEANINGS)
    return meanings and f"\n({meanings})"


def _columns_to_draw(tables: Iterable[StepTable], names: Iterable[str]) -> list[str]:
    """Those of the named columns in which at least one table has values other than 0."""
    tables = list(tables)
    return [name for name in names if any(_column(table, name).any() for table in tables)]


def _one_table(label: str, table: StepTable, path: PathLike | None, against: str) -> Figure:
    noisy, noise = _column(table, "s").any(), "s exp(l0 + l1 v)" if _learned(table) else "s"
    factors = _columns_to_draw([table], ("c0", "c1", "c2", "cu")) or ["c0"]
    history, kept = _columns_to_draw([table], ("h1", "h2", "h3")), _columns_to_draw([table], _HISTORY_TERMS)
    other_terms = f"{' + history' if history else ''}{'' if not noisy else ' + s z' if noise == 's' else ' + noise'}"
    equation = f"{_sum(factors)}{other_terms if len(factors) < 5 else f'{chr(10)}{other_terms}'}{_explained(factors)}"
    panels: list[tuple[str, Sequence[str], str]] = [
        ("predicted x0 = clip(a x + b m)", ("a", "b"), "factor (no unit)"),
        (f"next sample = {equation}", factors, "factor (no unit)"),
    ]
    if history or kept:
        panels += [
            (f"history = {_sum(history)}{_explained(history)}", history, "factor (no unit)"),
            (f"kept for later rows = {_sum(kept)}", kept, "factor (no unit)"),
        ]
    if noisy:
        spread = _DEVIATION_LABEL if noise == "s" else "s\n(factor of the learned deviation)"
        panels.append((f"noise of the step, {noise} z", ("s",), spread))
    panels.append((_TITLES[_vertical_axis(against)], (_vertical_axis(against),), _LABELS[_vertical_axis(against)]))
    x = _column(table, against)
    with new_figure(9, 0.4 + 2.6 * math.ceil(len(panels) / 2), path, "drawing a StepTable") as figure:
        for axes, (title, names, unit) in zip(_panels(figure, len(panels), against), panels, strict=True):
            for number, name in enumerate(names):
                axes.plot(x, _column(table, name), label=name, **line_style(number, len(table)))
            _label_and_scale(axes, title, unit, names)
            if len(names) > 1:
                axes.legend(ncols=2 if len(names) > 3 else 1)
        figure.suptitle(f"{label}, {plural(len(table), 'row')}")
    return figure


_TITLES = {
    "a": "a, of x in the predicted x0",
    "b": "b, of the model's output in x0",
    "c0": "c0, of x0 in the next sample",
    "c1": "c1, of x in the next sample",
    "c2": "c2, of the output in the next sample",
    "cu": "cu, of the unconditional output",
    "h1": "h1, of what was kept last",
    "h2": "h2, of what was kept before that",
    "h3": "h3, of what was kept still earlier",
    "k0": "k0, of x0 in what is kept",
    "k1": "k1, of x in what is kept",
    "k2": "k2, of the output in what is kept",
    "s": "s, of the step's noise",
    "timestep": "timestep",
    "step": "step of each timestep",
}
_LABELS = {"timestep": "timestep", "step": "step of the loop"}


def _vertical_axis(against: str) -> str:
    return "timestep" if against == "step" else "step"


def _several_tables(tables: Mapping[str, StepTable], path: PathLike | None, against: str) -> Figure:
    names = [name for name in _TITLES if name != against]
    drawn = _columns_to_draw(tables.values(), names) or names[-1:]
    zero = [name for name in ("a", "b", "c0", "c1", "c2", "s") if name not in drawn]
    labels = _LABELS | {"s": "factor of the noise" if any(map(_learned, tables.values())) else _DEVIATION_LABEL}
    rows = math.ceil(len(drawn) / 2)
    with new_figure(9, 0.9 + 2 * rows, path, "drawing step tables") as figure:
        panels = _panels(figure, len(drawn), against)
        for axes, name in zip(panels, drawn, strict=True):
            for number, (label, table) in enumerate(tables.items()):
                axes.plot(_column(table, against), _column(table, name), label=label, **line_style(number, len(table)))
            _label_and_scale(axes, _TITLES[name], labels.get(name, "factor (no unit)"), [name])
        handles = panels[0].get_legend_handles_labels()
        note = f"0 in all: {', '.join(zero)}" if zero else None
        if len(drawn) % 2:
            figure.axes[-1].legend(*handles, loc="center", title=note)
        else:
            figure.legend(*handles, loc="outside upper center", ncols=min(4, len(tables)), title=note)
    return figure


def _side_by_side(tables: Mapping[str, StepTable], path: PathLike | None, against: str) -> Figure:
    """A panel for each table with the factors of the next sample, in the same colours in all panels."""
    terms = _columns_to_draw(tables.values(), _SAMPLE_TERMS) or ["c0"]
    with new_figure(9, 1.3 + 2.3 * math.ceil(len(tables) / 2), path, "drawing step tables") as figure:
        lines = {}
        all_axes = _panels(figure, len(tables), against, shared=against == "timestep")
        for axes, (label, table) in zip(all_axes, tables.items(), strict=True):
            table_terms = _columns_to_draw([table], terms) or terms[:1]
            for name in table_terms:
                style = line_style(terms.index(name), len(table))
                (lines[name],) = axes.plot(_column(table, against), _column(table, name), label=name, **style)
            _label_and_scale(axes, label, "factor (no unit)", table_terms)
        drawn = [name for name in terms if name in lines]
        labels = [f"{name} {_SAMPLE_TERMS[name]}" for name in drawn]
        legend_lines = math.ceil(len(drawn) / _MOST_IN_LINE)
        columns = math.ceil(len(drawn) / legend_lines)
        title = f"the next sample is the sum of these terms{_explained(drawn)}"
        handles = [lines[name] for name in drawn]
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title)
    return figure


def _panels(figure: Figure, count: int, against: str, *, shared: bool = True) -> list[Axes]:
    """`count` axes in two columns; an odd number leaves a cell free. shared: whether they share the horizontal axis."""
    axes = list(figure.subplots(math.ceil(count / 2), 2, sharex=shared, squeeze=False).flat)
    for spare in axes[count:]:
        spare.axis("off")
    lowest = axes[:count][-2:]
    for panel in lowest:
        panel.set_xlabel(_LABELS[against])
        panel.tick_params(labelbottom=True)
    for panel in axes[:1] if shared else axes[:count]:
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.xaxis.set_inverted(against == "timestep")
    return axes[:count]


def _label_and_scale(axes: Axes, title: str, label: str, names: Sequence[str]) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines] or [np.zeros(1)])
    largest = float(np.abs(values).max())
    if largest > _LINEAR_UP_TO and not set(names) & _LABELS.keys():
        ticker = require("matplotlib.ticker", "drawing step tables")
        axes.set_yscale("asinh", linear_width=0.5)
        axes.yaxis.set_major_locator(ticker.SymmetricalLogLocator(base=10, linthresh=1))  # ticks at 0 and powers of ten
    elif largest > 0 and np.ptp(values) == 0:
        # Show 0 as well, since a constant is judged by its distance from 0.
        axes.update_datalim([(0, 0)], updatex=False)
        axes.autoscale_view()
    axes.set(title=title, ylabel=label)
