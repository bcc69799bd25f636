"""The losses of a training run as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ddpm_ext.plots.style import COLOURS, PathLike, new_figure, plural

__all__ = ["save_loss_curve"]


def save_loss_curve(losses: Sequence[float], path: PathLike, *, title: str = "Loss of each training step") -> None:
    """Draws the loss of each step, and the mean over a hundredth of the run, on two logarithmic axes.

    Raises:
        ValueError: there are no losses.
        OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> plots.save_loss_curve([1.0, 0.5, 0.4, 0.35], "losses.png")
    """
    if not len(losses):
        raise ValueError("losses: got none, expected at least 1")
    values = np.asarray(losses, dtype=np.float64)
    window = max(1, len(values) // 100)
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    with new_figure(7, 4, path, "the curve of losses") as figure:
        axes = figure.subplots()
        axes.loglog(np.arange(1, len(values) + 1), values, color="0.75", linewidth=0.6, label="each step")
        mean = f"mean of {plural(window, 'step')}"
        axes.loglog(np.arange(window, len(values) + 1), means, color=COLOURS[0], label=mean)
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.legend()
