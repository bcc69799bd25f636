"""The rows of linear multistep samplers, whose steps read values that earlier steps kept.

a_t is alphas_cumprod where a step starts, and a_s where it arrives. A value is the predicted clean sample x0 of a step,
or its eps = (x - sqrt(a_t) x0) / sqrt(1 - a_t), both after the clip of x0. A sampler passes the weights of each row:
the weight of the step's own value, then those of earlier values, the latest first: 1 to 4 weights. Missing weights
count as 0.
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

FEW = 15  # with fewer steps, lower_order_final lowers the order of the last two steps
SLOTS = 4  # the number of values that a step can read: the value at this step and at three earlier steps

Weights = Sequence[Sequence[float]]


def first_step(grid: Grid) -> int:
    """The first step whose value counts as history: 1 if the grid starts from pure noise, where sigma is infinite."""
    return int(grid.now[0] == 0)


def orders(grid: Grid, highest: int, *, lower_order_final: bool, lower_order_clean: bool = True) -> list[int]:
    """The order of each step: at most `highest`, and at most one more than the number of earlier values.

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
    """Each row's weights of the values at its step and at earlier steps, the latest first: as many as the step's order.

    They give the mean, over the step, of the polynomial through these values.

    Args:
        nodes: (rows + 1,), the polynomial's variable, such as sigma, where each step starts. The last entry is where
            the last step arrives.
        order_of_step: (rows,), the order of each step.
        density: see lagrange_weights.
    """
    return [
        [1.0] if order == 1 else lagrange_weights([nodes[i - k] for k in range(order)], nodes[i + 1], density)
        for i, order in enumerate(order_of_step)
    ]


def _columns(weights: Weights) -> list[Tensor]:
    """The weights as SLOTS columns, (rows,) each, with zeros for missing weights."""
    padded = np.zeros((len(weights), SLOTS))
    for i, row in enumerate(weights):
        padded[i, : len(row)] = row
    return [torch.from_numpy(column) for column in padded.T.copy()]


def rows_by_x0(grid: Grid, prediction: str, x_factor: Tensor, weights: Weights, s: Tensor | None = None) -> StepTable:
    """The rows of prev = x_factor x + w0 x0 + w1 X1 + w2 X2 + w3 X3 + s z.

    X1, X2 and X3 are the x0 of the last three steps, X1 the latest. w0 to w3 are a row's weights.
    """
    h0, h1, h2, h3 = _columns(weights)
    k0 = torch.ones_like(x_factor)
    return coefficients.rows(grid, prediction, c0=h0, c1=x_factor, s=s, h1=h1, h2=h2, h3=h3, k0=k0)


def sde_factors(grid: Grid, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Each step's factor of x and standard deviation of the noise, for an SDE in terms of predicted clean samples.

    Args:
        extra: (rows,), each step's length in lambda times the sampler's amount of noise, which is eta, or tau^2 of
            SA-Solver; 0 for the probability flow.
    """
    x_factor = ((1 - grid.after) / (1 - grid.now)).sqrt() * torch.exp(-extra)
    return x_factor, (1 - grid.after).sqrt() * (-torch.expm1(-2 * extra)).sqrt()


def eps_slope(grid: Grid) -> Tensor:
    """The factor of eps in Euler's step, sqrt(1 - a_s) - sqrt(a_s (1 - a_t) / a_t); 0 for a step from pure noise, where
    it would be infinite."""
    now, after = grid.now, grid.after
    slope = (1 - after).sqrt() - (after * (1 - now) / now).sqrt()
    return torch.where(now > 0, slope, 0.0)


def rows_by_eps(grid: Grid, prediction: str, weights: Weights) -> StepTable:
    """The rows of Euler's step in sigma along w0 eps + w1 E1 + w2 E2 + w3 E3.

    E1, E2 and E3 are the eps of the last three steps, E1 the latest. w0 to w3 are a row's weights, which sum to 1.
    """
    start, slope = euler(grid, prediction=prediction), eps_slope(grid)
    k0, k1 = -(grid.now / (1 - grid.now)).sqrt(), (1 - grid.now).rsqrt()
    now, h1, h2, h3 = _columns(weights)
    correction = slope * (now - 1)
    c0, c1 = start.c0 + correction * k0, start.c1 + correction * k1
    return replace(start, c0=c0, c1=c1, h1=slope * h1, h2=slope * h2, h3=slope * h3, k0=k0, k1=k1)
