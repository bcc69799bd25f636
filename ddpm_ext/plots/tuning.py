"""Figures of the errors of tuned tables and named samplers against the number of model calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddpm_ext.base.optional import require
from ddpm_ext.plots.style import PathLike, legend_below, line_style, new_figure
from ddpm_ext.tuning.names import Named
from ddpm_ext.tuning.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CURVES = 5  # the most names that are drawn as coloured curves, with a line each in the legend
_TOP_OF_AXIS = 3.0  # the upper end of the vertical axis, as a multiple of the largest error on coloured curves


def errors_by_name(names: Mapping[int, Sequence[Named]]) -> dict[str, dict[int, float]]:
    """Returns {name of sampler and spacing: {number of calls: error}}, the names with the smallest errors first.

    Names are sorted by log(error / smallest error of all names with as many calls), averaged over the numbers of calls.
    Names without an error for some number of calls come last.

    names: {number of calls: the results of named samplers}.
    """
    errors_of: dict[str, dict[int, float]] = {}
    for calls, named in names.items():
        for sampler in named:
            name_errors = errors_of.setdefault(sampler.label, {})
            name_errors[calls] = min(sampler.error, name_errors.get(calls, math.inf))
    best = {calls: min(errors[calls] for errors in errors_of.values() if calls in errors) for calls in names}

    def rank(name: str) -> tuple[int, float]:
        errors = errors_of[name]
        ratios = [math.log(max(error, 1e-12) / max(best[calls], 1e-12)) for calls, error in errors.items()]
        return len(best) - len(errors), sum(ratios) / len(ratios)

    return {name: errors_of[name] for name in sorted(errors_of, key=rank)}


def names_figure(names: Mapping[int, Sequence[Named]], path: PathLike | None = None) -> Figure:
    """Draws the errors of named samplers against the calls of the model: the best in colour, all others in grey.

    Args:
        names: {number of calls: the results of Tuner.compare}.
        path: if not None, the figure is also written to this file. The ending determines the format.

    Raises:
        ValueError: there are no names. ValueError, OSError: `path` can't be written, or its ending is unknown.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> from ddpm_ext.tuning import Named
        >>> errors = {"error": 0.1, "standard_error": 0.01, "mean": 0.12, "median": 0.09}
        >>> names = {n: [Named(sampler="unipc", spacing="trailing", steps=n, calls=n, **errors)] for n in (4, 6)}
        >>> figure = plots.names_figure(names, "names.png")
    """
    if not any(names.values()):
        raise ValueError("names: got none, expected at least 1")
    with new_figure(9, 6, path, "drawing what samplers reach") as figure:
        axes = figure.subplots()
        _draw_names(axes, names, list(errors_by_name(names))[:_MOST_CURVES], first=0)
        legend_below(figure, 2)
    return figure


def tuning_figure(reports: Sequence[Report], path: PathLike | None = None) -> Figure:
    """Draws the result of tuning: on the left the errors of tuned tables and named samplers against the calls of the
    model, on the right the timesteps of the tables.

    Args:
        reports: of tables that were tuned to one model, in any order.
        path: if not None, the figure is also written to this file. The ending determines the format.

    Raises:
        ValueError: there are no reports. ValueError, OSError: `path` can't be written, or its ending is unknown.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> from ddpm_ext.tuning import Named, Report
        >>> errors = {"error": 0.04, "standard_error": 0.002, "mean": 0.05, "median": 0.03}
        >>> names = [Named(sampler="unipc", spacing="trailing", steps=6, calls=6, **errors | {"error": 0.1})]
        >>> fit = {"fitted": True, "fitted_error": 0.04, "names": names, "timesteps": [999, 800, 600, 400, 200, 20]}
        >>> by = {"teacher": "100 steps of deis", "teacher_error": 0.001, "seeds": 32, "held_out": 32}
        >>> cost = {"model_calls": 9000, "names_calls": 1000, "batch": 32}
        >>> report = Report(calls=6, **errors, **fit, **by, **cost)
        >>> figure = plots.tuning_figure([report], "tuned.png")
    """
    if not reports:
        raise ValueError("reports: got none, expected at least 1")
    reports = sorted(reports, key=lambda report: report.calls)
    names = {report.calls: report.names for report in reports}
    with new_figure(12, 5, path, "drawing what tuning found") as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        calls = [report.calls for report in reports]
        left.plot(calls, [report.error for report in reports], label="tuned", **line_style(0, len(calls)) | _BOLD)
        medians = line_style(0, len(calls)) | {"linestyle": ":", "zorder": 3}
        left.plot(calls, [report.median for report in reports], label="tuned, median", **medians)
        bests = [report.best.error for report in reports]
        left.plot(
            calls, bests, label="best name", **line_style(1, len(calls)) | {"linestyle": "none", "markersize": 11}
        )
        curves = {report.best.label: None for report in reports}
        _draw_names(left, names, list(curves | dict.fromkeys(errors_by_name(names)))[:_MOST_CURVES], first=2)
        lowest = min(*(report.error for report in reports), *bests)
        left.set_ylim(bottom=min(left.get_ylim()[0], lowest / 1.3))
        legend_below(figure, 3)
        for position, report in enumerate(reports):
            right.plot(report.timesteps, [position] * len(report.timesteps), **line_style(0, 1) | {"markersize": 7})
        right.set_yticks(range(len(reports)), [str(report.calls) for report in reports])
        right.set(title="timesteps of the tables", xlabel="timestep", ylabel="calls of the model")
        right.set_ylim(-0.5, len(reports) - 0.5)
        right.xaxis.set_inverted(True)
    return figure


_BOLD = {"linewidth": 3.5, "markersize": 7, "zorder": 3}


def _draw_names(axes: Axes, names: Mapping[int, Sequence[Named]], curves: Sequence[str], first: int) -> None:
    """Draws the errors of all names, in grey but for the names in `curves`, whose line styles count from `first`."""
    errors = errors_by_name(names)
    for number, name in enumerate([*(grey for grey in errors if grey not in curves), *curves], -len(errors)):
        calls = sorted(errors[name])
        values = [errors[name][count] for count in calls]
        if name in curves:
            axes.plot(calls, values, label=name, **line_style(number + len(curves) + first, len(calls)))
        else:
            style: dict[str, Any] = {"color": "0.8", "linewidth": 0.7, "marker": ".", "markersize": 3}
            axes.plot(calls, values, label="all others" if number == -len(errors) else None, zorder=1, **style)
    curve_errors = [error for name in curves for error in errors[name].values() if math.isfinite(error)]
    axes.set_yscale("log")
    ticker = require("matplotlib.ticker", "drawing errors")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if curve_errors:
        axes.set_ylim(min(curve_errors) / 1.3, _TOP_OF_AXIS * max(curve_errors))
    axes.set_xticks(sorted(names))
    axes.set(title="distance to many steps", xlabel="calls of the model", ylabel="mean of the nearest 90 %")
