"""The chart of speed.md: eager PyTorch's time over ours, for the noise and for a step without its model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.overview.steps import OPERATIONS, SHAPES, Measured, named, ratio
from ddpm_ext.plots.style import COLOURS, new_figure


def draw(measured: Measured, path: Path) -> None:
    """Writes the chart to `path`."""
    with new_figure(6.4, 2.4, path, "the chart") as figure:
        axes = figure.subplots()
        names = [f"{operation}, {named(shape)}" for operation in OPERATIONS for shape in SHAPES]
        ratios = [ratio(measured, operation, shape) for operation in OPERATIONS for shape in SHAPES]
        bars = axes.barh(names, ratios, color=COLOURS[0])
        axes.bar_label(bars, [f"{value:.1f}" for value in ratios], padding=3)
        axes.set(title="without the model: eager PyTorch's time / ours", xlim=(0, 1.1 * max(ratios)))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
