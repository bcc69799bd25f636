"""Rows of linear multistep samplers, whose steps read values that earlier steps kept.

A sampler passes each row's weights: the weight of the value at this step, then the weights of earlier values, the
latest first. There are as many weights as the step's order, up to 4. Values are the predicted clean samples x0, or eps
= (x - sqrt(a_t) x0) / sqrt(1 - a_t). Both are taken after the clip of x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.ddim import euler
from ddpm_ext.tables.step_table import StepTable

FEW = 15  # with fewer steps, the last step is of first order
SLOTS = 4  # the number of values that a step can read: the value at this step and at three earlier steps

Weights = Sequence[Sequence[float]]


def first_step(grid: Grid) -> int:
    """The first step whose value counts as history: 1 if the grid starts from pure noise, where sigma is infinite."""
    return int(grid.now[0] == 0)


def orders(grid: Grid, highest: int, *, lower_order_final: bool, lower_order_clean: bool = True) -> list[int]:
    """The order of each step: at most `most`, and at most one more than the number of earlier values.

    With `lower_order_clean`, a step that arrives at clean data is of first order. With `lower_order_final`, the last of
    fewer than 15 steps is of first order, and the last but one at most of second order, as in diffusers.
    """
    steps, first = len(grid), first_step(grid)
    order_of_step = [min(highest, max(1, i - first + 1)) for i in range(steps)]
    if lower_order_final and steps < FEW:
        order_of_step[-2:] = [
            min(order, highest) for order, highest in zip(order_of_step[-2:], (2, 1)[-steps:], strict=True)
        ]
    if lower_order_clean and grid.after[-1] == 1:
        order_of_step[-1] = 1
    return order_of_step


def lagrange_weights(
    nodes: Sequence[float], end: float, density: Callable[[np.ndarray], np.ndarray] = np.ones_like
) -> list[float]:
    """The mean of each Lagrange polynomial of the nodes over the interval from nodes[0] to `end`. The means sum to 1.

    Args:
        nodes: distinct.
        density: the weight of a point in the mean, as a function of the distance from nodes[0].
    """
    points, weights = np.polynomial.legendre.leggauss(20)
    distance = (end - nodes[0]) * (points + 1) / 2
    weights = weights * density(distance)
    offsets = np.array(nodes) - nodes[0]
    means = []
    for j, node in enumerate(offsets):
        other_offsets = np.delete(offsets, j)
        values = np.prod((distance[:, None] - other_offsets) / (node - other_offsets), axis=1)
        means.append(float((weights * values).sum() / weights.sum()))
    return means


def extrapolated(
    nodes: Sequence[float], order_of_step: Sequence[int], density: Callable[[np.ndarray], np.ndarray] = np.ones_like
) -> list[list[float]]:
    """Each row's weights: they give the mean, over the step, of a polynomial through as many values as its order.

    Args:
        nodes: (rows + 1,), where each step starts. The last entry is where the last step arrives.
        order_of_step: (rows,), the order of each step.
        density: see lagrange_weights.
    """
    return [
        [1.0] if order == 1 else lagrange_weights([nodes[i - k] for k in range(order)], nodes[i + 1], density)
        for i, order in enumerate(order_of_step)
    ]


def _columns(weights: Weights) -> list[Tensor]:
    padded = np.zeros((len(weights), SLOTS))
    for i, row in enumerate(weights):
        padded[i, : len(row)] = row
    return [torch.from_numpy(column) for column in padded.T.copy()]


def of_x0(grid: Grid, prediction: str, of_x: Tensor, weights: Weights, s: Tensor | None = None) -> StepTable:
    """Rows of prev = of_x x + w0 x0 + w1 X1 + w2 X2 + w3 X3 + s z, where X1 is the previous step's x0."""
    h0, h1, h2, h3 = _columns(weights)
    k0 = torch.ones_like(of_x)
    return coefficients.rows(grid, prediction, c0=h0, c1=of_x, s=s, h1=h1, h2=h2, h3=h3, k0=k0)


def of_sde(grid: Grid, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Each step's factor of x and standard deviation of the noise, for an SDE in terms of predicted clean samples.

    Args:
        extra: (rows,), the step's length in lambda times the squared amount of noise. It is 0 for the probability flow.
    """
    of_x = ((1 - grid.after) / (1 - grid.now)).sqrt() * torch.exp(-extra)
    return of_x, (1 - grid.after).sqrt() * (-torch.expm1(-2 * extra)).sqrt()


def eps_slope(grid: Grid) -> Tensor:
    """The factor of eps in Euler's step: sqrt(1 - a_s) - sqrt(a_s (1 - a_t) / a_t); 0 for a step from pure noise."""
    now, after = grid.now, grid.after
    slope = (1 - after).sqrt() - (after * (1 - now) / now).sqrt()
    return torch.where(now > 0, slope, 0.0)


def of_eps(grid: Grid, prediction: str, weights: Weights) -> StepTable:
    """Rows of Euler's step in sigma along w0 eps + w1 E1 + w2 E2 + w3 E3, where E1 is the previous step's eps.

    The weights of a row sum to 1.
    """
    start, slope = euler(grid, prediction=prediction), eps_slope(grid)
    k0, k1 = -(grid.now / (1 - grid.now)).sqrt(), (1 - grid.now).rsqrt()
    now, h1, h2, h3 = _columns(weights)
    correction = slope * (now - 1)
    c0, c1 = start.c0 + correction * k0, start.c1 + correction * k1
    return replace(start, c0=c0, c1=c1, h1=slope * h1, h2=slope * h2, h3=slope * h3, k0=k0, k1=k1)
