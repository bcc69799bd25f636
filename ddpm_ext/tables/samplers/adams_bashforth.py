"""Samplers by Adams and Bashforth's method, whose steps integrate a polynomial through the eps of the last steps."""

from __future__ import annotations

import numpy as np
import torch

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.samplers import coefficients, multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.two_calls import merged
from ddpm_ext.tables.step_table import StepTable

__all__ = ["deis", "ipndm", "lms", "plms"]

ORDERS = multistep.SLOTS + 1  # orders are below this number
# Adams and Bashforth's weights of the first to fourth order, for steps of equal length.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@at_any_scale
def lms(grid: Grid, *, prediction: str = "eps", order: int = 4) -> StepTable:
    """Adams and Bashforth's method for steps of any length, for the probability flow in sigma, like k-diffusion's lms.

    The slope of x / sqrt(alphas_cumprod) by sigma is eps (Karras et al. 2022, eq. 3); the step is the exact integral of
    the polynomial in sigma through the last `order` slopes. The first steps use as many slopes as exist.

    Args:
        grid: descending.
        prediction: see ddpm.
        order: 1 to 4.

    Raises:
        TypeError: `order` is not an int.
        ValueError: an unknown `prediction`, or an `order` out of range.

    Examples:
        >>> table = lms(grid, order=3)  # for sampler= of a loop
    """
    order = checks.integer("order", order, ORDERS, str(ORDERS), start=1)
    sigma = (1 / grid.alphas_cumprod - 1).sqrt().tolist()
    order_of_step = multistep.orders(grid, order, lower_order_final=False, lower_order_clean=False)
    return multistep.rows_by_eps(grid, prediction, multistep.extrapolated(sigma, order_of_step))


@at_any_scale
def deis(grid: Grid, *, prediction: str = "eps", order: int = 2, lower_order_final: bool = True) -> StepTable:
    """tAB-DEIS: Zhang & Chen 2023, section 3.3, with the polynomial in log sigma, which diffusers calls "logrho".

    The step is the exact integral over sigma of the polynomial through the last `order` eps.

    Args:
        grid: descending.
        prediction: see ddpm.
        order: 1 to 3 as in diffusers, or 4.
        lower_order_final: with fewer than 15 steps, whether the last step is of first order and the last but one of
            second.

    The first step is of first order, and so is a last step that arrives at clean data, where log sigma is infinite.

    For the errors see lms.

    Examples:
        >>> table = deis(grid, order=3)  # for sampler= of a loop
    """
    order = checks.integer("order", order, ORDERS, str(ORDERS), start=1)
    log_sigma = (-coefficients.half_log_snr(grid)).tolist()
    order_of_step = multistep.orders(grid, order, lower_order_final=lower_order_final)
    return multistep.rows_by_eps(grid, prediction, multistep.extrapolated(log_sigma, order_of_step, np.exp))


@at_any_scale
def ipndm(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """iPNDM: Zhang & Chen 2023, with the same weights as diffusers.

    DDIM's step along a weighted mean of the last four eps, with the weights for steps of equal length. The first three
    steps use as many eps as exist.

    Args:
        grid: descending.
        prediction: see ddpm.

    Raises:
        ValueError: an unknown `prediction`.

    Examples:
        >>> table = ipndm(grid)  # for sampler= of a loop
    """
    order_of_step = multistep.orders(grid, 4, lower_order_final=False, lower_order_clean=False)
    return multistep.rows_by_eps(grid, prediction, [ADAMS_BASHFORTH[order - 1] for order in order_of_step])


@at_any_scale
def plms(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """PLMS, the multistep sampler of PNDM: Liu et al. 2022, with the same samples as diffusers.

    These are iPNDM's rows and one more row. After the first step, the model is called at the second timestep, and the
    first step is repeated with the mean of both eps. No row keeps the eps of this additional call. len(grid) steps are
    len(grid) + 1 rows. With fewer than two steps, not counting one from pure noise, there is no additional row. With
    prediction "v", diffusers takes means of v in place of eps.

    For the arguments and errors see ipndm.

    Examples:
        >>> len(plms(grid))  # the first step calls the model twice
        4
    """
    table = ipndm(grid, prediction=prediction)
    first = multistep.first_step(grid)
    if len(grid) < first + 2:
        return table
    half_slope = multistep.eps_slope(grid)[first : first + 1] / 2
    second_row = table[first + 1 : first + 2]
    levels = dict(zip(LEVELS, (second_row.signal_now, second_row.noise_now) * 2, strict=True))
    c0, c1 = half_slope * second_row.k0, 1 + half_slope * second_row.k1
    repeated_step = StepTable(
        second_row.timestep, second_row.a, second_row.b, c0, c1, h1=-half_slope, g0=second_row.g0, **levels
    )
    rows = torch.arange(len(table), device="cpu")
    return merged([(2 * rows, table), (2 * rows[first : first + 1] + 1, repeated_step)])
