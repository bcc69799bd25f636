"""DEIS: an exponential integrator with a polynomial through the last eps."""

from __future__ import annotations

import numpy as np

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import coefficients, multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.step_table import StepTable

__all__ = ["deis"]


@at_any_scale
def deis(grid: Grid, *, prediction: str = "eps", order: int = 2, lower_order_final: bool = True) -> StepTable:
    """tAB-DEIS: Zhang & Chen 2023, section 3.3, with the polynomial in log sigma, as diffusers' "logrho".

    The step is the exact integral over sigma of the polynomial through the last `order` eps.

    Args:
        grid: descending.
        prediction: as for ddpm.
        order: 1 to 3 as in diffusers, or 4.
        lower_order_final: whether the last of fewer than 15 steps is of first order, and the one before of second.

    The first step is of first order, and so is a last step that arrives at clean data, where log sigma is infinite.

    Raises:
        TypeError: `order` is not an int.
        ValueError: an unknown `prediction`, or an `order` out of range.
    """
    order = checks.integer("order", order, multistep.SLOTS + 1, str(multistep.SLOTS + 1), start=1)
    log_sigma = (-coefficients.half_log_snr(grid)).tolist()
    used = multistep.orders(grid, order, lower_order_final=lower_order_final)
    return multistep.of_eps(grid, prediction, multistep.extrapolated(log_sigma, used, np.exp))
