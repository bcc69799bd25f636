"""Adams-Bashforth's weights on DDIM's step: PLMS of PNDM, and iPNDM."""

from __future__ import annotations

import torch

from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.samplers import multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.two_calls import merged
from ddpm_ext.tables.step_table import StepTable

__all__ = ["ipndm", "plms"]

# Adams and Bashforth's weights of the first to fourth order, for steps of equal length.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@at_any_scale
def ipndm(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """iPNDM: Zhang & Chen 2023, as diffusers has it.

    DDIM's step along a weighted mean of the last four eps, with the weights of equal steps. The first three steps have
    as many eps as there are.

    Args:
        grid: descending.
        prediction: as for ddpm.

    Raises:
        ValueError: an unknown `prediction`.
    """
    used = multistep.orders(grid, 4, lower_order_final=False, lower_order_clean=False)
    return multistep.of_eps(grid, prediction, [ADAMS_BASHFORTH[order - 1] for order in used])


@at_any_scale
def plms(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """PLMS, the multistep sampler of PNDM: Liu et al. 2022, as Stable Diffusion and diffusers have it.

    These are iPNDM's rows and one more: after the first step, the model is called at the second timestep, and the mean
    of both eps takes the first step anew, to the same timestep. The eps of that call is not kept. len(grid) steps are
    len(grid) + 1 rows; a single step is one row. With prediction "v", diffusers takes means of v in place of eps.

    Args, raises: as for ipndm.
    """
    table = ipndm(grid, prediction=prediction)
    first = multistep.first_step(grid)
    if len(grid) < first + 2:
        return table
    half = multistep.eps_slope(grid)[first : first + 1] / 2
    there = table[first + 1 : first + 2]
    again = StepTable(
        there.timestep,
        there.a,
        there.b,
        c0=half * there.k0,
        c1=1 + half * there.k1,
        h1=-half,
        g0=there.g0,
        **dict(zip(LEVELS, (there.signal_now, there.noise_now) * 2, strict=True)),
    )
    rows = torch.arange(len(table), device="cpu")
    return merged([(2 * rows, table), (2 * rows[first : first + 1] + 1, again)])
