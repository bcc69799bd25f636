"""Noise schedules as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ddpm_ext.plots.style import PathLike, Values, line_style, new_figure, to_array

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def schedule_figure(schedules: Mapping[str, Values], path: PathLike | None = None) -> Figure:
    """Draws alphas_cumprod and the signal-to-noise ratio, alphas_cumprod / (1 - alphas_cumprod), of schedules.

    Args:
        schedules: {name in the legend: the schedule's alphas_cumprod, (timesteps,) in [0, 1]}. If their lengths differ,
            the horizontal axis is t / timesteps.
        path: if not None, the figure is also written to this file. The ending determines the format.

    Raises:
        ValueError: there are no schedules, a schedule has a wrong shape or values outside [0, 1], or `path` is a folder
            or has an unknown ending.
        OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> levels = {name: GaussianDiffusion(1000, name).alphas_cumprod for name in ("linear", "cosine")}
        >>> figure = plots.schedule_figure(levels, "schedules.png")
    """
    if not schedules:
        raise ValueError("schedules: got none, expected at least 1")
    levels = {name: to_array(values) for name, values in schedules.items()}
    for name, values in levels.items():
        if values.ndim != 1 or not len(values):
            raise ValueError(f"schedules[{name!r}] has shape {values.shape}, expected (timesteps,)")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"schedules[{name!r}] has values outside [0, 1], expected alphas_cumprod")
    lengths = {len(values) for values in levels.values()}
    with new_figure(9, 4, path, "drawing schedules") as figure:
        power, ratio = figure.subplots(1, 2, sharex=True)
        for number, (name, values) in enumerate(levels.items()):
            t = np.arange(len(values)) / (1 if len(lengths) == 1 else len(values))
            with np.errstate(divide="ignore"):
                snr = values / (1 - values)
            snr[(snr == 0) | np.isinf(snr)] = np.nan  # a logarithmic axis can't show them
            style = line_style(number, len(values))
            power.plot(t, values, label=name, **style)
            ratio.plot(t, snr, label=name, **style)
        power.set(title="signal left", ylabel="alphas_cumprod\n(share of the power)", ylim=(-0.03, 1.03))
        ratio.set(title="signal-to-noise ratio", ylabel="signal / noise\n(ratio of powers)")
        ratio.set_yscale("log")
        for axes in (power, ratio):
            axes.set_xlabel("timestep t" if len(lengths) == 1 else "t / timesteps")
        power.legend()
    return figure
