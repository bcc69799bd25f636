"""How the values of samples are distributed along a sampling loop, as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddpm_ext.base import checks
from ddpm_ext.base.optional import require
from ddpm_ext.plots.style import Array, PathLike, Values, line_style, new_figure, to_array

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def histogram_figure(
    x_t: Sequence[Values],
    timesteps: Sequence[int | float],
    path: PathLike | None = None,
    *,
    samples: Values | None = None,
    bins: int = 80,
    limit: float | None = None,
    name: str = "",
) -> Figure:
    """Draws how the values of x_t are distributed along a loop, from noise on the left to samples on the right.

    On the left is a map of the density over timestep and value, with logarithmic colours; it is white where the density
    is 0. On the right are the densities of x_t at the highest timestep, of the samples, and of the standard normal.

    Args:
        x_t: the noisy samples at each timestep, of any shape. They must be copies, because a loop overwrites its
            tensor.
        timesteps: one for each x_t, all different, rising or falling.
        path: if not None, the figure is also written to this file. The ending determines the format.
        samples: the result of the loop. None means x_t at the lowest timestep.
        bins: the number of bins between -limit and limit, at least 1.
        limit: values from -limit to limit are shown. None shows all values.
        name: the sampler's name, for the title.

    Raises:
        TypeError: `bins` is not an int.
        ValueError: there are fewer than 2 timesteps, or not as many as x_t, or they neither rise nor fall throughout;
            values are missing or not finite; `bins` is below 1; `limit` is not finite and above 0; or `path` is a
            folder or has an unknown ending.
        OSError: `path` can't be written.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> figure = plots.histogram_figure([x_t, images], [999, 0], "histogram.png", name="ddim")
    """
    checks.integer("bins", bins, 2**31, "2^31", start=1)
    t, values = _in_loop_order(x_t, timesteps)
    last = values[-1] if samples is None else _flat("samples", samples)
    if limit is None:
        limit = float(math.ceil(max(np.abs(array).max() for array in (*values, last)))) or 1.0
    if not 0 < limit < math.inf:
        raise ValueError(f"limit is {limit}, expected a finite number above 0")
    edges = np.linspace(-limit, limit, bins + 1)
    density = np.stack([_density(array, edges) for array in values], axis=1)
    with new_figure(9, 4.4, path, "drawing a histogram") as figure:
        over_time, ends = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        colors = require("matplotlib.colors", "drawing a histogram")
        positive = density[density > 0]
        norm = (
            colors.LogNorm(positive.min(), positive.max())
            if positive.size and positive.min() < positive.max()
            else None
        )
        masked = np.ma.masked_equal(density, 0)
        borders = _borders(t)
        mesh = over_time.pcolormesh(borders, edges, masked, norm=norm, cmap="viridis", rasterized=True)
        over_time.grid(False)
        over_time.set(
            title=f"density of x_t{name and f', {name}'}",
            xlabel="timestep t",
            ylabel="value of an element",
            xlim=(borders[0], borders[-1]),
        )
        figure.colorbar(mesh, ax=ends, label="density (1 / unit of the value)")
        middles = (edges[1:] + edges[:-1]) / 2
        curves = {
            f"t = {t[0]:g}": density[:, 0],
            "samples" if samples is not None else f"t = {t[-1]:g}": _density(last, edges),
            "N(0, 1)": np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi),
        }
        for number, (label, curve) in enumerate(curves.items()):
            ends.plot(np.where(curve > 0, curve, np.nan), middles, label=label, **line_style(number, bins))
        ends.set_xscale("log")
        ends.set_xlim(left=max(1e-4, positive.min() / 2) if positive.size else None)
        ends.set(title="first and last", xlabel="density")
        ends.legend(fontsize="small")
    return figure


def _in_loop_order(x_t: Sequence[Values], timesteps: Sequence[int | float]) -> tuple[Array, list[Array]]:
    """The timesteps from the highest to the lowest, and for each the values of x_t as a flat array."""
    t = np.asarray(timesteps, dtype=np.float64)
    if len(x_t) < 2 or t.shape != (len(x_t),):
        raise ValueError(f"timesteps: got {len(t)} for {len(x_t)} x_t, expected as many, at least 2")
    gaps = np.diff(t)
    if not (np.isfinite(t).all() and ((gaps > 0).all() or (gaps < 0).all())):
        raise ValueError("timesteps are not in order, expected all rising or all falling")
    values = [_flat(f"x_t[{i}]", array) for i, array in enumerate(x_t)]
    return (t, values) if gaps[0] < 0 else (t[::-1], values[::-1])


def _flat(name: str, samples: Values) -> Array:
    values = to_array(samples).ravel()
    if not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"{name}: got {'values that are not finite' if values.size else 'none'}, expected finite values"
        )
    return values


def _density(values: Array, edges: Array) -> Array:
    """The density in each bin. Values beyond the edges count in the total, so they don't raise the density inside."""
    return np.histogram(values, edges)[0] / (len(values) * np.diff(edges))


def _borders(t: Array) -> Array:
    """The borders of the map's columns, halfway between timesteps. The outer columns are centred on their timesteps."""
    middles = (t[1:] + t[:-1]) / 2
    return np.concatenate([[2 * t[0] - middles[0]], middles, [2 * t[-1] - middles[-1]]])
