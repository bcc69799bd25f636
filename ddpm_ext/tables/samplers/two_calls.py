"""The rows of samplers whose steps call the model twice, and which may add noise between steps.

The first row of a step is an Euler step to the level of the second call: between the step's ends or, for Heun's method,
at its end. The second row computes the end of the step from the sample at that level and the x0 that the first row
keeps. It does not need the sample at the step's start, which follows from these two. If a step ends at less noise than
the next step starts with, its last row also adds noise.
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
    """The timesteps of sigmas that lie between the grid's levels, float64.

    Raises:
        ValueError: a grid that has neither a schedule nor a timestep_of.
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
    """The Jumps from levels `now` to levels `after`."""
    return Jumps(timestep, now, after, now / after)


class Correction(NamedTuple):
    """The second rows of the n steps that have two rows, (n,) each.

    Attributes:
        calls: the levels where the model is called.
        x0_factor, x_factor, first_factor: the weights of x0, x and the first row's x0 in the next sample, where x and
            the next sample are divided by sqrt(alphas_cumprod).
    """

    calls: Jumps
    x0_factor: Tensor
    x_factor: Tensor
    first_factor: Tensor


def two_calls(prediction: str, steps: Jumps, s: Tensor, twice: Tensor, correction: Correction) -> StepTable:
    """The rows of all steps: two for a step that calls the model twice, otherwise one Euler row.

    Args:
        prediction: see ddpm.
        steps: each step from its start to the level that it reaches after its noise is added.
        s: (steps,), the standard deviation of the noise.
        twice: bool (steps,), which steps call the model twice.
        correction: the second rows of these steps.
    """
    step_number = torch.arange(len(steps), device="cpu")
    parts = []
    if twice.any():
        calls, signal = correction.calls, steps.after[twice].sqrt()
        first = euler(jumps(steps.timestep[twice], steps.now[twice], calls.now), prediction=prediction)
        second = coefficients.rows(
            calls,
            prediction,
            c0=signal * correction.x0_factor,
            c1=signal / calls.now.sqrt() * correction.x_factor,
            h1=signal * correction.first_factor,
            s=s[twice],
            **level_columns(calls.now, steps.after[twice]),
        )
        first = replace(first, k0=torch.ones_like(first.a))
        parts += [(2 * step_number[twice], first), (2 * step_number[twice] + 1, second)]
    has_one_row = ~twice
    if has_one_row.any():
        single_row_steps = Jumps(
            steps.timestep[has_one_row], steps.now[has_one_row], steps.after[has_one_row], steps.alphas[has_one_row]
        )
        parts.append(
            (2 * step_number[has_one_row], implicit(single_row_steps, prediction, s[has_one_row], keep_eps=False))
        )
    return merged(parts)


def merged(parts: Sequence[tuple[Tensor, StepTable]]) -> StepTable:
    """Merges the rows of several tables into one table, sorted by keys. Each row gets the merged table's default draw.

    parts: pairs (keys, table), with a key for each row of the table, int64 (rows,).
    """
    order = torch.cat([keys for keys, _ in parts]).argsort()
    return StepTable(
        **{name: torch.cat([getattr(table, name) for _, table in parts])[order] for name in COLUMNS if name != "draw"}
    )
