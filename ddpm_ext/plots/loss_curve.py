"""The losses of a training run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_ext.plots.style import COLOURS, PathLike, line_style, new_figure

_QUARTERS = ("first quarter of the timesteps", "second quarter", "third quarter", "last quarter, the most noise")


def save_loss_curve(
    losses: Sequence[float],
    path: PathLike,
    *,
    title: str = "Loss of each training step",
    quarters: Sequence[Sequence[float]] | None = None,
) -> None:
    """Draws the loss of each step on logarithmic axes. With 200 steps or more it also draws a moving mean.

    The moving mean is over a hundredth of the steps.

    Args:
        losses: (steps,).
        path: the picture's file.
        title: the text above the picture.
        quarters: (steps, 4), each step's mean loss in each quarter of the timesteps, NaN for a quarter without samples.
            Their moving means over a hundredth of the steps are also drawn.

    Raises:
        ValueError: there are no losses, or not four `quarters` for each of them; or `path` is a folder or has an
            unknown ending.
        OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> plots.save_loss_curve([1.0, 0.5, 0.4, 0.35], "losses.png")
    """
    if not len(losses):
        raise ValueError("losses: got none, expected at least 1")
    values, quarter_losses = np.asarray(losses, dtype=np.float64), np.full((len(losses), 4), np.nan)
    if quarters is not None:
        quarter_losses = np.asarray(quarters, dtype=np.float64)
        if quarter_losses.shape != (len(values), 4):
            raise ValueError(
                f"quarters: got shape {quarter_losses.shape}, expected {(len(values), 4)}, four for each loss"
            )
    window = max(1, len(values) // 100)
    steps = np.arange(window, len(values) + 1)
    with new_figure(7, 4, path, "the curve of losses") as figure:
        axes = figure.subplots()
        axes.loglog(np.arange(1, len(values) + 1), values, color="0.75", linewidth=0.6, label="each step")
        if window > 1:
            axes.loglog(steps, _moving_mean(values, window), color=COLOURS[0], label=f"mean of {window} steps")
        for number, (label, losses_of_quarter) in enumerate(zip(_QUARTERS, quarter_losses.T, strict=True), 1):
            means = _moving_mean(losses_of_quarter, window)
            if np.isfinite(means).any():
                axes.loglog(steps, means, label=label, **line_style(number, len(steps)) | {"linewidth": 1})
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.legend()


def _moving_mean(values: Any, window: int) -> Any:
    """For each `window` consecutive values, the mean of those that are finite; NaN if none is."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    sums, counts = (np.convolve(terms, ones, mode="valid") for terms in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0.5)
