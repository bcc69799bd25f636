"""Heun's method: second order with two calls of the model a step."""

from __future__ import annotations

import torch

from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.levels import LEVELS, level_columns
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.ddim import euler
from ddpm_ext.tables.step_table import StepTable

__all__ = ["heun"]


@at_any_scale
def heun(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """Heun's method for the probability flow in sigma: Karras et al. 2022, algorithm 1, without churn.

    A step is two rows, and so two calls of the model. The first is Euler's, to a preliminary x at the next timestep;
    the second corrects it by the slope found there. For x / sqrt(alphas_cumprod), and with r the ratio of the sigmas
    before and after the step, the correction adds (r - 1) / 2 (x0 - x0 of the Euler row), so that the sample before
    both rows is not needed. The last step is Euler's alone; so is a step from pure noise, where sigma is infinite.
    len(grid) steps are up to 2 len(grid) - 1 rows.

    Args, raises: as for dpmpp_2m.
    """
    start = euler(grid, prediction=prediction)
    middle = grid.after[:-1]
    ratio = ((1 - grid.now[:-1]) / grid.now[:-1] * middle / (1 - middle)).sqrt()
    half = middle.sqrt() * (ratio - 1) / 2
    zeros = torch.zeros_like(half)
    correction = {
        **{name: getattr(start, name)[1:] for name in ("timestep", "a", "b", "g0")},
        **{"c0": half, "c1": torch.ones_like(half), "c3": -half},
        **level_columns(middle, middle),
    }
    finite = torch.stack([torch.ones_like(ratio), ratio], 1).flatten().isfinite()
    columns = {}
    for name in ("timestep", "a", "b", "c0", "c1", "c3", "g0", *LEVELS):
        euler_rows = getattr(start, name)
        pairs = torch.stack([euler_rows[:-1], correction.get(name, zeros)], 1).flatten()
        columns[name] = torch.cat([pairs[finite], euler_rows[-1:]])
    return StepTable(**columns)
