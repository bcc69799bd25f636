"""Restart sampling: Heun's method, which returns to more noise and repeats an interval of sigmas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.heun import heun_steps
from ddpm_ext.tables.samplers.two_calls import jumps, timesteps_of
from ddpm_ext.tables.sigma_grids import alphas_cumprod_of, karras_sigmas, sigmas_of
from ddpm_ext.tables.step_table import StepTable

__all__ = ["restart"]

Interval = tuple[int, int, float, float]


@at_any_scale
def restart(
    grid: Grid, *, prediction: str = "eps", intervals: Sequence[Interval] = ((3, 2, 0.06, 0.30),), s_noise: float = 1.0
) -> StepTable:
    """Restart sampling: Xu et al. 2023, section 3, with Heun's steps.

    When a step arrives at an interval's t_min, fresh noise leads back to the interval's t_max, and n - 1 Heun steps
    lead down to t_min again. This is repeated k times. Each time, the row that arrives at t_min adds the noise. t_min
    is replaced by the nearest sigma of the grid at which a step other than the first starts. An interval is skipped if
    its t_max is not above this sigma or is above the grid's first sigma.

    Args:
        grid: descending, with a schedule or a timestep_of.
        prediction: see ddpm. "x_prev" is refused.
        intervals: tuples (n, k, t_min, t_max), the columns of the paper's tables. n is the number of sigmas, both ends
            included, spaced as karras_grid spaces them. k is the number of repetitions. t_min and t_max are sigmas,
            noise over signal. The default is the authors' example for CIFAR-10.
        s_noise: a factor of the noise's standard deviation, finite, >= 0.

    Raises:
        TypeError: n or k is not an int, or another argument is not a number.
        ValueError: an interval or `s_noise` out of range, an unknown `prediction` or "x_prev", or a repetition in a
            grid that has neither a schedule nor a timestep_of.

    Examples:
        >>> from ddpm_ext.tables.sigma_grids import karras_grid
        >>> grid = karras_grid(gd.alphas_cumprod, 18)
        >>> table = restart(grid, intervals=[(3, 2, 0.06, 0.30)])  # sigmas, times, t_min, t_max
    """
    coefficients.check_between(prediction)
    checks.nonnegative("s_noise", s_noise)
    sigma = sigmas_of(grid.alphas_cumprod)
    # {number of the step that starts at t_min: the sigmas of each repetition}
    repetitions: dict[int, list[Tensor]] = {}
    for number, (n, k, low, high) in enumerate(intervals):
        name = f"intervals[{number}]"
        n = checks.integer(f"{name}'s n", n, 2**31, "2^31", start=2)
        k = checks.integer(f"{name}'s k", k, 2**31, "2^31", start=1)
        checks.nonnegative(f"{name}'s t_min", low)
        checks.nonnegative(f"{name}'s t_max", high)
        if not low < high:
            raise ValueError(f"{name} has t_min {low} and t_max {high}, expected t_min < t_max")
        if len(grid) > 1:
            nearest = 1 + int((sigma[1:-1] - low).abs().argmin())
            if sigma[nearest] < high <= sigma[0]:
                repetitions.setdefault(nearest, []).extend([karras_sigmas(high, sigma[nearest].item(), n)[:-1]] * k)

    # The (levels, timesteps) at which the steps start, and at which all steps except the last end.
    starts, ends = [], []
    for i in range(len(grid)):
        start_of_step = grid.now[i : i + 1], grid.timestep[i : i + 1]
        for sigmas in repetitions.get(i, ()):
            levels, timesteps = alphas_cumprod_of(sigmas), timesteps_of(grid, sigmas)
            starts.append((levels, timesteps))
            ends += [(levels[1:], timesteps[1:]), start_of_step]
        starts.append(start_of_step)
        ends.append((grid.now[i + 1 : i + 2], grid.timestep[i + 1 : i + 2]))
    (start, timestep), (end, timestep_of_end) = (map(torch.cat, zip(*path, strict=True)) for path in (starts, ends))
    after = torch.cat([start[1:], grid.after[-1:]])
    table = heun_steps(prediction, jumps(timestep, start, after), jumps(timestep_of_end, end, after[:-1]))
    return replace(table, s=s_noise * table.s)
