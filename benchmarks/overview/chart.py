"""The README's chart: on the left what a fused step is faster at, on the right what that means for a whole loop."""

from __future__ import annotations

from pathlib import Path

from benchmarks.overview.loops import DIGITS, Timed
from benchmarks.overview.steps import OPERATIONS, SHAPES, Measured, named, ratio
from ddpm_ext.plots.style import COLOURS, new_figure


def draw(measured: Measured, timed: list[Timed], path: Path) -> None:
    """Writes the chart to `path`."""
    with new_figure(9, 3.4, path, "the chart") as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25), gridspec_kw={"wspace": 0.08})
        names = [f"{operation}, {named(shape)}" for operation in OPERATIONS for shape in SHAPES]
        ratios = [ratio(measured, operation, shape) for operation in OPERATIONS for shape in SHAPES]
        bars = left.barh(names, ratios, color=COLOURS[0])
        left.bar_label(bars, [f"{value:.1f}" for value in ratios], padding=3)
        left.set(title="eager PyTorch's time / ours", xlim=(0, 1.2 * max(ratios)))
        loops = [each for each in timed if each.model == DIGITS]
        labels = [f"{each.way}\n{each.steps:,} steps" for each in loops]
        bars = right.barh(labels, [each.seconds for each in loops], color=COLOURS[0])
        right.bar_label(bars, [f"{each.seconds:.3g} ({each.outside:.1g})" for each in loops], padding=3)
        right.set(title="64 digits, whole loops", xlim=(0, 1.6 * max(each.seconds for each in loops)))
        right.set_xlabel("seconds (outside the U-Net)")
        for axes in (left, right):
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
