"""SA-Solver: a stochastic Adams predictor, and a corrector that costs no call of the model."""

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
    """SA-Predictor and SA-Corrector, in their form for predicted clean samples: Xue et al. 2023; the same as diffusers.

    A row first corrects x by the model's output at x, then takes the step from there. The corrector has the noise of
    the step that it corrects, so that it differs from the predictor by predicted clean samples alone, of this step and
    those before. As in diffusers, the model's output at the corrected sample is not computed, and of second order, the
    slope of x0 by lambda weighs as at the step's end. The first step is of first order, and so is a last step that
    arrives at clean data.

    Args:
        grid: descending.
        prediction: as for ddpm.
        eta: tau of the paper, how much noise there is: 0 for the probability flow, 1 for the SDE; finite, >= 0.
        interval: (low, high), the timesteps at which tau is eta, both included; elsewhere it is 0. None: everywhere.
            diffusers has (200, 800) unless it is given a function.
        predictor_order: how many predicted clean samples the predictor uses, 1 to 3.
        corrector_order: how many the corrector uses, of which one is at the step's end, 1 to 4.
        lower_order_final: whether the orders fall over the last steps.

    Raises:
        TypeError: `eta` is not a number, or an order not an int.
        ValueError: `eta` is negative or not finite, an unknown `prediction`, or an order out of range.

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
    of_x, s = multistep.of_sde(grid, extra)
    levels, signal = lam.tolist(), grid.alphas_cumprod.sqrt().tolist()
    predictors = multistep.orders(grid, predictor_order, lower_order_final=False)
    correctors = multistep.orders(grid, corrector_order, lower_order_final=False, lower_order_clean=False)
    if lower_order_final:
        predictors = [min(own, steps - i) for i, own in enumerate(predictors)]
        correctors = [min(own, steps - i + 2) for i, own in enumerate(correctors)]
    weights = []
    for i in range(steps):
        step = signal[i + 1] * _weights(levels, i, i, predictors[i], rate[i])
        if i > first:  # by how much the corrected sample differs from the predictor's, which x is
            corrected = _weights(levels, i - 1, i, correctors[i], rate[i - 1])
            before = np.roll(_weights(levels, i - 1, i - 1, predictors[i - 1], rate[i - 1]), 1)
            step += of_x[i].item() * signal[i] * (corrected - before)
        weights.append(step.tolist())
    return multistep.of_x0(grid, prediction, of_x, weights, s)


def _weights(levels: list[float], step: int, newest: int, order: int, rate: float) -> np.ndarray:
    """The weights of x0 in the integral of e^(rate lambda) x0 over a step, by the signal at its end. (SLOTS,)

    Args:
        levels: half of the log signal-to-noise ratio where each step starts, and at the end.
        newest: the number of the latest x0, at whose level the polynomial's first node is; the others are before it.
        rate: 1 + tau^2.
    """
    start, end = levels[step], levels[step + 1]
    h = end - start
    total = -math.expm1(-rate * h)
    weights = np.zeros(SLOTS)
    if order == 1:
        weights[0] = total
    elif order == 2:
        # The slope of x0 by the level, times h^2 / 2 and the rate, at which the integrand ends.
        at_start = newest - step
        other = levels[newest - 1 + at_start]
        weights[1 - at_start] = rate * h**2 / 2 / (other - start)
        weights[at_start] = total - weights[1 - at_start]
    else:
        nodes = [levels[newest - k] for k in range(order)]
        far = start if newest > step else end  # the interval's end that is not the first node
        weights[:order] = multistep.lagrange_weights(nodes, far, lambda distance: np.exp(rate * distance))
        weights *= total
    return weights
