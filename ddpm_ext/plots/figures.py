"""Figures with axes: schedules, how samples' values are distributed over a loop, losses; and what figures share.

Each returns a matplotlib Figure, made without pyplot, and writes it where a path is given; the ending says in which
format, .png, .svg or .pdf. The same input gives the same bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ddpm_ext.base import checks
from ddpm_ext.base.files import atomic_path
from ddpm_ext.base.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["histogram_figure", "save_loss_curve", "schedule_figure"]

Array = npt.NDArray[np.float64]
Values = torch.Tensor | npt.NDArray[np.floating]
PathLike = str | os.PathLike[str]

# Okabe and Ito's colours for all eyes, without the yellow, which white paper swallows. Dashes and, where steps are few,
# markers tell the lines apart in grey as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 2)), (0, (7, 2, 1.5, 2)), (0, (10, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 4)))
_MARKERS = "os^DvPX"
_FEW = 25  # steps up to which each is marked
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
_WITHOUT_DATE = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@contextmanager
def new_figure(width: float, height: float, path: PathLike | None, purpose: str) -> Iterator[Figure]:
    """A figure of width by height inches to draw on, written to `path` when the block ends well."""
    matplotlib, figures = require("matplotlib", purpose), require("matplotlib.figure", purpose)
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(width, height), dpi=100, layout="constrained")  # no pyplot: no display
        yield figure
        if path is not None:
            with atomic_path(path) as beside:
                figure.savefig(beside, metadata=_WITHOUT_DATE.get(Path(path).suffix.lower()))


def look(number: int, steps: int) -> dict[str, Any]:
    """How the number-th line of an axis looks; later ones are thinner, so that an equal one below still shows."""
    count = len(_COLOURS)
    style: dict[str, Any] = {
        "color": _COLOURS[number % count],
        "linestyle": _DASHES[(number + number // count) % len(_DASHES)],
        "linewidth": max(1.6, 2.6 - 0.35 * number),
    }
    if steps <= _FEW:
        style |= {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 5, "markerfacecolor": "white"}
    return style


def to_array(values: Values) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------ schedules


def schedule_figure(schedules: Mapping[str, Values], path: PathLike | None = None) -> Figure:
    """Draws alphas_cumprod and the signal-to-noise ratio, alphas_cumprod / (1 - alphas_cumprod), of schedules.

        schedule_figure({name: GaussianDiffusion(1000, name).alphas_cumprod for name in ("linear", "cosine")})

    Args:
        schedules: by name, which the legend shows, alphas_cumprod (timesteps,) in [0, 1]. Where they differ in length,
            the axis is t / timesteps.
        path: where it is written as well.

    Raises:
        ValueError: no schedules, or one of another shape or out of [0, 1]. OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.
    """
    if not schedules:
        raise ValueError("schedules: got none, expected at least 1")
    levels = {name: to_array(values) for name, values in schedules.items()}
    for name, values in levels.items():
        if values.ndim != 1 or not len(values):
            raise ValueError(f"schedules[{name!r}] has shape {values.shape}, expected (timesteps,)")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"schedules[{name!r}] leaves [0, 1], expected alphas_cumprod, in [0, 1]")
    lengths = {len(values) for values in levels.values()}
    with new_figure(9, 4, path, "drawing schedules") as figure:
        power, ratio = figure.subplots(1, 2, sharex=True)
        for number, (name, values) in enumerate(levels.items()):
            t = np.arange(len(values)) / (1 if len(lengths) == 1 else len(values))
            with np.errstate(divide="ignore"):
                snr = values / (1 - values)
            snr[(snr == 0) | np.isinf(snr)] = np.nan  # a logarithmic axis has no place for them
            style = look(number, len(values))
            power.plot(t, values, label=name, **style)
            ratio.plot(t, snr, label=name, **style)
        power.set(title="signal left", ylabel="alphas_cumprod\n(share of the power)", ylim=(-0.03, 1.03))
        ratio.set(title="signal-to-noise ratio", ylabel="signal / noise\n(ratio of powers)")
        ratio.set_yscale("log")
        for axes in (power, ratio):
            axes.set_xlabel("timestep t" if len(lengths) == 1 else "t / timesteps")
        power.legend()
    return figure


# ------------------------------------------------------------------------------------------ values over the loop


def histogram_figure(
    moments: Sequence[Values],
    timesteps: Sequence[int | float],
    path: PathLike | None = None,
    *,
    samples: Values | None = None,
    bins: int = 80,
    limit: float | None = None,
) -> Figure:
    """Draws how the values of x_t are distributed along a loop, from noise on the left to samples on the right.

    A map of the density over timestep and value, its colour logarithmic, white where there is no value; beside it the
    densities of the first moment and of the samples, with that of the standard normal.

    Args:
        moments: x_t of each moment, of any shape; copies, not a loop's own buffer.
        timesteps: one a moment, all different, rising or falling.
        path: where it is written as well.
        samples: what the loop ended with; None: the moment of the lowest timestep.
        bins: how many between the limits, at least 1.
        limit: values from -limit to limit are shown; None: all.

    Raises:
        TypeError: `bins` is no int. ValueError: less than 2 moments, another number of timesteps, timesteps that go up
            and down, values that are not finite, or `limit` not above 0. OSError: `path` can't be written.
            MissingExtra: matplotlib is not installed.
    """
    checks.integer("bins", bins, 2**31, "2^31", start=1)
    t, values = _check_moments(moments, timesteps)
    last = values[-1] if samples is None else _flat("samples", samples)
    if limit is None:
        limit = float(math.ceil(max(np.abs(moment).max() for moment in (*values, last)))) or 1.0
    if not 0 < limit < math.inf:
        raise ValueError(f"limit is {limit}, expected a finite number above 0")
    edges = np.linspace(-limit, limit, bins + 1)
    density = np.stack([_density(moment, edges) for moment in values], axis=1)
    with new_figure(9, 4.4, path, "drawing a histogram") as figure:
        over_time, beside = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        colors = require("matplotlib.colors", "drawing a histogram")
        shown = density[density > 0]
        norm = colors.LogNorm(shown.min(), shown.max()) if shown.size and shown.min() < shown.max() else None
        masked = np.ma.masked_equal(density, 0)
        sides = _between(t)
        mesh = over_time.pcolormesh(sides, edges, masked, norm=norm, cmap="viridis", rasterized=True)
        over_time.grid(False)
        over_time.set(
            title="density of x_t", xlabel="timestep t", ylabel="value of an element", xlim=(sides[0], sides[-1])
        )
        figure.colorbar(mesh, ax=beside, label="density (1 / unit of the value)")
        middles = (edges[1:] + edges[:-1]) / 2
        curves = {
            f"t = {t[0]:g}": density[:, 0],
            "samples" if samples is not None else f"t = {t[-1]:g}": _density(last, edges),
            "N(0, 1)": np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi),
        }
        for number, (label, curve) in enumerate(curves.items()):
            beside.plot(np.where(curve > 0, curve, np.nan), middles, label=label, **look(number, bins))
        beside.set_xscale("log")
        beside.set_xlim(left=max(1e-4, shown.min() / 2) if shown.size else None)
        beside.set(title="first and last", xlabel="density")
        beside.legend(fontsize="small")
    return figure


def _check_moments(moments: Sequence[Values], timesteps: Sequence[int | float]) -> tuple[Array, list[Array]]:
    """Timesteps and flat values, from the highest timestep to the lowest."""
    t = np.asarray(timesteps, dtype=np.float64)
    if len(moments) < 2 or t.shape != (len(moments),):
        raise ValueError(f"timesteps: got {len(t)} for {len(moments)} moments, expected as many, at least 2")
    gaps = np.diff(t)
    if not (np.isfinite(t).all() and ((gaps > 0).all() or (gaps < 0).all())):
        raise ValueError("timesteps are not in order, expected all rising or all falling")
    values = [_flat(f"moments[{i}]", moment) for i, moment in enumerate(moments)]
    return (t, values) if gaps[0] < 0 else (t[::-1], values[::-1])


def _flat(name: str, moment: Values) -> Array:
    values = to_array(moment).ravel()
    if not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"{name}: got {'values that are not finite' if values.size else 'none'}, expected finite values"
        )
    return values


def _density(values: Array, edges: Array) -> Array:
    """Of all values, also of those past the edges, so that what is shown is not made larger by what is not."""
    return np.histogram(values, edges)[0] / (len(values) * np.diff(edges))


def _between(t: Array) -> Array:
    """Edges halfway between the moments; the first and last moments are as wide as their neighbours."""
    middles = (t[1:] + t[:-1]) / 2
    return np.concatenate([[2 * t[0] - middles[0]], middles, [2 * t[-1] - middles[-1]]])


# --------------------------------------------------------------------------------------------------------- losses


def save_loss_curve(losses: Sequence[float], path: PathLike) -> None:
    """Draws losses, one a step, and their mean over a hundredth of the run, both axes logarithmic.

    Raises:
        ValueError: no losses. OSError: `path` can't be written. MissingExtra: matplotlib is not installed.
    """
    if not len(losses):
        raise ValueError("losses: got none, expected at least 1")
    values = np.asarray(losses, dtype=np.float64)
    window = max(1, len(values) // 100)
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    with new_figure(7, 4, path, "the curve of losses") as figure:
        axes = figure.subplots()
        axes.loglog(np.arange(1, len(values) + 1), values, color="0.75", linewidth=0.6, label="each step")
        axes.loglog(np.arange(window, len(values) + 1), means, color=_COLOURS[0], label=f"mean of {_of(window)}")
        axes.set(xlabel="step", ylabel="loss", title="Mean squared error of the model's prediction")
        axes.legend()


def _of(window: int) -> str:
    return f"{window} step{'s' * (window != 1)}"
