"""The linear multistep method in sigma."""

from __future__ import annotations

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.step_table import StepTable

__all__ = ["lms"]


@at_any_scale
def lms(grid: Grid, *, prediction: str = "eps", order: int = 4) -> StepTable:
    """Adams and Bashforth's method for steps of any length, for the probability flow in sigma, as k-diffusion's.

    The slope of x / sqrt(alphas_cumprod) by sigma is eps (Karras et al. 2022, eq. 3); the step is the exact integral of
    the polynomial in sigma through the last `order` slopes. The first steps have as many slopes as there are.

    Args:
        grid: descending.
        prediction: as for ddpm.
        order: 1 to 4.

    Raises:
        TypeError: `order` is not an int.
        ValueError: an unknown `prediction`, or an `order` out of range.
    """
    order = checks.integer("order", order, multistep.SLOTS + 1, str(multistep.SLOTS + 1), start=1)
    sigma = (1 / grid.alphas_cumprod - 1).sqrt().tolist()
    used = multistep.orders(grid, order, lower_order_final=False, lower_order_clean=False)
    return multistep.of_eps(grid, prediction, multistep.extrapolated(sigma, used))
