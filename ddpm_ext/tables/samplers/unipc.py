"""UniPC: a multistep predictor, and a corrector that needs no additional call of the model."""

from __future__ import annotations

import math

import numpy as np

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import coefficients, multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.step_table import StepTable

__all__ = ["unipc"]

SOLVERS = ("bh2", "bh1")
ORDERS = 4  # orders are below this number


@at_any_scale
def unipc(
    grid: Grid, *, prediction: str = "eps", order: int = 2, solver: str = "bh2", lower_order_final: bool = True
) -> StepTable:
    """UniPC in its form for predicted clean samples: Zhao et al. 2023, section 3.

    A row first corrects x by the model's output at x (UniC), then takes the step from the corrected sample (UniP). The
    corrected sample differs from x by a weighted sum of predicted clean samples, of this step and of earlier steps, so
    later rows need only a row's x0. As in diffusers, the model's output at the corrected sample is not computed. The
    first step is of first order, and so is a last step that arrives at clean data.

    Args:
        grid: descending.
        prediction: see ddpm.
        order: the predictor's order, 1 to 3. The corrector's order is higher by one.
        solver: B(h) of the paper. "bh1" is h, "bh2" is e^h - 1.
        lower_order_final: whether the order falls to 1 over the last steps.

    Raises:
        TypeError: `order` is not an int.
        ValueError: an unknown `prediction` or `solver`, or an `order` out of range.

    Examples:
        >>> table = unipc(grid)  # for sampler= of a loop
    """
    order = checks.integer("order", order, ORDERS, str(ORDERS), start=1)
    checks.one_of("solver", solver, SOLVERS)
    levels, first = coefficients.half_log_snr(grid).tolist(), multistep.first_step(grid)
    signal, noise = grid.alphas_cumprod.sqrt().tolist(), (1 - grid.alphas_cumprod).sqrt().tolist()
    steps = len(grid)
    order_of_step = multistep.orders(grid, order, lower_order_final=False)
    if lower_order_final:
        order_of_step = [min(highest, steps - i) for i, highest in enumerate(order_of_step)]

    x_factor = ((1 - grid.after) / (1 - grid.now)).sqrt()
    weights = []
    for i in range(steps):
        step = np.zeros(ORDERS)
        step[: order_of_step[i]] = _predictor(levels, i, order_of_step[i], solver)
        step *= signal[i + 1]
        # x is the result of the previous step's predictor. The difference to UniC's result is added to x.
        if i > first:
            predicted = np.zeros(ORDERS)
            predicted[1 : order_of_step[i - 1] + 1] = _predictor(levels, i - 1, order_of_step[i - 1], solver)
            corrected = _corrector(levels, i - 1, order_of_step[i - 1], solver)
            step += noise[i + 1] / noise[i] * signal[i] * (corrected - predicted)
        weights.append(step.tolist())
    return multistep.rows_by_x0(grid, prediction, x_factor, weights)


def _base(h: float, solver: str) -> float:
    """B(-h) of the paper: -h for "bh1", e^-h - 1 for "bh2"."""
    return -h if solver == "bh1" else math.expm1(-h)


def _right_side(h: float, order: int, solver: str) -> np.ndarray:
    """The right side of the linear equations that _predictor and _corrector solve for rho: (order,).

    Entry n - 1 is n! z phi_{n+1}(z) / B(z) for z = -h, with phi_0(z) = e^z and phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z.
    """
    phi, factorial, values = math.expm1(-h) / -h - 1, 1, []
    for k in range(2, order + 2):
        values.append(phi * factorial / _base(h, solver))
        factorial *= k
        phi = phi / -h - 1 / factorial
    return np.array(values)


def _ratios(levels: list[float], i: int, order: int) -> np.ndarray:
    """lambda of earlier steps minus lambda of step i, divided by the length of step i: (order - 1,), negative.

    levels: lambda, half of the log signal-to-noise ratio, where each step starts, and at the last step's end.
    """
    return np.array([(levels[i - k] - levels[i]) / (levels[i + 1] - levels[i]) for k in range(1, order)])


def _predictor(levels: list[float], i: int, order: int, solver: str) -> np.ndarray:
    """UniP's weights for step i, divided by the signal at the step's end: (order,).

    The weights belong to x0 at step i, then at earlier steps.
    """
    h = levels[i + 1] - levels[i]
    weights = np.zeros(order)
    weights[0] = -math.expm1(-h)
    if order > 1:
        ratios = _ratios(levels, i, order)
        powers = np.vander(ratios, increasing=True).T
        # For one ratio, the paper and diffusers set rho to 1/2.
        rho = np.array([0.5]) if order == 2 else np.linalg.solve(powers, _right_side(h, order, solver)[:-1])
        _add_differences(weights, 0, -_base(h, solver) * rho / ratios)
    return weights


def _corrector(levels: list[float], i: int, order: int, solver: str) -> np.ndarray:
    """UniC's weights for step i, divided by the signal at the step's end: (ORDERS,).

    The weights belong to x0 at the step's end, at step i, then at earlier steps.
    """
    h = levels[i + 1] - levels[i]
    weights = np.zeros(ORDERS)
    weights[1] = -math.expm1(-h)
    ratios = np.append(_ratios(levels, i, order), 1.0)
    powers = np.vander(ratios, increasing=True).T
    rho = np.array([0.5]) if order == 1 else np.linalg.solve(powers, _right_side(h, order, solver))
    shares = -_base(h, solver) * rho / ratios
    _add_differences(weights, 1, shares[:-1])
    weights[0] += shares[-1]
    weights[1] -= shares[-1]
    return weights


def _add_differences(weights: np.ndarray, base: int, shares: np.ndarray) -> None:
    """Adds the terms shares[k] * (value[base + 1 + k] - value[base]) to the weights of the values."""
    weights[base + 1 : base + 1 + len(shares)] += shares
    weights[base] -= shares.sum()
