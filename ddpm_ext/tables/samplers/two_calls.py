"""Rows of samplers whose steps are two calls of the model, and of noise between steps.

The first row of a step is Euler's to a level in the middle. The second computes the end of the step from there and
from the x0 that the first row keeps; the sample before both rows follows from these two. A step may end
at less noise than the next one starts with: the last of its rows then adds fresh noise up to that level, in the same
launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.levels import level_columns, unit_levels
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.ddim import euler, implicit
from ddpm_ext.tables.sigma_grids import alphas_cumprod_of, timestep_at
from ddpm_ext.tables.step_table import COLUMNS, StepTable


def timesteps_of(grid: Grid, sigma: Tensor) -> Tensor:
    """The timesteps of sigmas between those of the grid, float64.

    Raises:
        ValueError: a grid that has neither a schedule nor a function for them.
    """
    if grid.timestep_of is not None:
        return grid.timesteps_between(*unit_levels(alphas_cumprod_of(sigma)))
    if grid.schedule is None:
        raise ValueError(
            "grid has timesteps for its own levels alone, and the sampler calls the model between them: expected a "
            "grid of a schedule, or grid_of_levels with a function of signal and noise as `timestep`"
        )
    return timestep_at(grid.schedule, sigma)


def jumps(timestep: Tensor, now: Tensor, after: Tensor) -> Jumps:
    """Steps from now to after."""
    return Jumps(timestep, now, after, now / after)


class Correction(NamedTuple):
    """The second rows of the steps that have two, (n,) each.

    calls: where the model is called for them. of_x0, of_x, of_first: the weights of x0, of x and of the first row's x0,
    where x and the next sample are divided by sqrt(alphas_cumprod).
    """

    calls: Jumps
    of_x0: Tensor
    of_x: Tensor
    of_first: Tensor


def two_calls(prediction: str, steps: Jumps, s: Tensor, twice: Tensor, correction: Correction) -> StepTable:
    """The rows of all steps: two where the model is called twice, and else Euler's alone.

    Args:
        prediction: as for ddpm.
        steps: from where each starts to the level that it reaches with its noise.
        s: (steps,), the standard deviation of that noise.
        twice: bool (steps,), which of the steps call the model twice.
        correction: of these.
    """
    number = torch.arange(len(steps), device="cpu")
    parts = []
    if twice.any():
        calls, signal = correction.calls, steps.after[twice].sqrt()
        first = euler(jumps(steps.timestep[twice], steps.now[twice], calls.now), prediction=prediction)
        second = coefficients.rows(
            calls,
            prediction,
            c0=signal * correction.of_x0,
            c1=signal / calls.now.sqrt() * correction.of_x,
            h1=signal * correction.of_first,
            s=s[twice],
            **level_columns(calls.now, steps.after[twice]),
        )
        first = replace(first, k0=torch.ones_like(first.a))
        parts += [(2 * number[twice], first), (2 * number[twice] + 1, second)]
    once = ~twice
    if once.any():
        alone = Jumps(steps.timestep[once], steps.now[once], steps.after[once], steps.alphas[once])
        parts.append((2 * number[once], implicit(alone, prediction, s[once], keep_eps=False)))
    return merged(parts)


def merged(parts: Sequence[tuple[Tensor, StepTable]]) -> StepTable:
    """The rows of several tables as one, in the order of the keys, int64 (rows,) for each table."""
    order = torch.cat([keys for keys, _ in parts]).argsort()
    return StepTable(
        **{name: torch.cat([getattr(table, name) for _, table in parts])[order] for name in COLUMNS if name != "draw"}
    )
