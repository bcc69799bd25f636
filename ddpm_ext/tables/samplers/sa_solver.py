"""SA-Solver: a stochastic Adams predictor, and a corrector that needs no additional call of the model."""

from __future__ import annotations

import math

import numpy as np
import torch

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import coefficients, multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.eta import check_eta
from ddpm_ext.tables.step_table import StepTable

__all__ = ["sa_solver"]

SLOTS = multistep.SLOTS


@at_any_scale
def sa_solver(
    grid: Grid,
    *,
    prediction: str = "eps",
    eta: float = 1.0,
    interval: tuple[float, float] | None = None,
    predictor_order: int = 2,
    corrector_order: int = 2,
    lower_order_final: bool = True,
) -> StepTable:
    """SA-Predictor and SA-Corrector in the form for predicted clean samples: Xue et al. 2023, as in diffusers.

    A row first corrects x by the model's output at x, then takes the step from the corrected sample. The corrector uses
    the noise of the step that it corrects. So the corrector's and the predictor's result differ only by predicted clean
    samples, of this step and of earlier steps. As in diffusers, the model's output at the corrected sample is not
    computed, and at second order, the slope of x0 by lambda has the same weight in the whole step as at its end. The
    first step is of first order, and so is a last step that arrives at clean data.

    Args:
        grid: descending.
        prediction: see ddpm.
        eta: tau of the paper, the amount of noise, finite, >= 0. 0 is the probability flow, 1 the SDE.
        interval: (low, high). tau is eta at timesteps from low to high, both included, and 0 at all others. With None,
            tau is eta everywhere. diffusers uses (200, 800) unless the caller passes a function for tau.
        predictor_order: how many predicted clean samples the predictor uses, 1 to 3.
        corrector_order: how many of them the corrector uses, including the x0 at the step's end, 1 to 4.
        lower_order_final: whether the orders fall over the last steps.

    Raises:
        TypeError: `eta` or an end of `interval` is not a number, or an order not an int.
        ValueError: `eta` or an end of `interval` is negative or not finite, an unknown `prediction`, or an order out of
            range.

    Examples:
        >>> table = sa_solver(grid, eta=0.5)  # for sampler= of a loop
    """
    eta = check_eta(eta)
    predictor_order = checks.integer("predictor_order", predictor_order, SLOTS, str(SLOTS), start=1)
    corrector_order = checks.integer("corrector_order", corrector_order, SLOTS + 1, str(SLOTS + 1), start=1)
    tau = torch.full_like(grid.now, eta)
    if interval is not None:
        for end in interval:
            checks.nonnegative("interval", end)
        tau[(grid.timestep < interval[0]) | (grid.timestep > interval[1])] = 0
    rate = (1 + tau**2).tolist()
    lam, steps, first = coefficients.half_log_snr(grid), len(grid), multistep.first_step(grid)
    extra = torch.where(tau > 0, tau**2 * lam.diff(), 0.0)  # 0 even where a step is infinite
    x_factor, s = multistep.sde_factors(grid, extra)
    levels, signal = lam.tolist(), grid.alphas_cumprod.sqrt().tolist()
    predictors = multistep.orders(grid, predictor_order, lower_order_final=False)
    correctors = multistep.orders(grid, corrector_order, lower_order_final=False, lower_order_clean=False)
    if lower_order_final:
        predictors = [min(order, steps - i) for i, order in enumerate(predictors)]
        correctors = [min(order, steps - i + 2) for i, order in enumerate(correctors)]
    weights = []
    for i in range(steps):
        step = signal[i + 1] * _weights(levels, i, i, predictors[i], rate[i])
        # x is the result of the previous step's predictor. The difference to the corrector's result is added to x.
        if i > first:
            corrected = _weights(levels, i - 1, i, correctors[i], rate[i - 1])
            predicted = np.roll(_weights(levels, i - 1, i - 1, predictors[i - 1], rate[i - 1]), 1)
            step += x_factor[i].item() * signal[i] * (corrected - predicted)
        weights.append(step.tolist())
    return multistep.rows_by_x0(grid, prediction, x_factor, weights, s)


def _weights(levels: list[float], step: int, newest: int, order: int, rate: float) -> np.ndarray:
    """The weights of the last `order` x0, the latest first, in rate * integral of e^(rate (lambda - end)) x0: (SLOTS,).

    The integral is over the step, which arrives at lambda = end; x0 is the polynomial in lambda through these values.
    At second order the integral is approximate: see sa_solver.

    Args:
        levels: lambda, half of the log signal-to-noise ratio, where each step starts, and at the last step's end.
        newest: the number of the step that predicts the latest x0: `step`, or step + 1 for the corrector. The other x0
            are of the steps before it.
        rate: 1 + tau^2.
    """
    start, end = levels[step], levels[step + 1]
    h = end - start
    total = -math.expm1(-rate * h)
    weights = np.zeros(SLOTS)
    if order == 1:
        weights[0] = total
    elif order == 2:
        # The slope of x0 by lambda, times h^2 / 2 and the rate.
        at_start = newest - step
        other_level = levels[newest - 1 + at_start]
        weights[1 - at_start] = rate * h**2 / 2 / (other_level - start)
        weights[at_start] = total - weights[1 - at_start]
    else:
        nodes = [levels[newest - k] for k in range(order)]
        other_end = start if newest > step else end  # the interval's end that is not the first node
        weights[:order] = multistep.lagrange_weights(nodes, other_end, lambda distance: np.exp(rate * distance))
        weights *= total
    return weights
