"""Heun's method, which has second order and calls the model twice in a step."""

from __future__ import annotations

import torch

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.two_calls import Correction, two_calls
from ddpm_ext.tables.sigma_grids import sigmas_of
from ddpm_ext.tables.step_table import StepTable

__all__ = ["heun", "heun_steps"]


@at_any_scale
def heun(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """Heun's method for the probability flow in sigma: Karras et al. 2022, algorithm 1, without churn.

    A step is two rows, and each row calls the model. The first row is an Euler step to a preliminary x at the next
    timestep. The second row corrects x by the slope at this timestep. The last step is one Euler row, and so is a step
    from pure noise, where sigma is infinite. len(grid) steps are up to 2 len(grid) - 1 rows.

    For the arguments and errors see ipndm.

    Examples:
        >>> len(heun(grid))  # three steps: two rows each, but one row for the last step
        5
    """
    steps = Jumps(grid.timestep, grid.now, grid.after, grid.alphas)
    return heun_steps(prediction, steps, Jumps(grid.timestep[1:], grid.now[1:], grid.after[1:], grid.alphas[1:]))


def heun_steps(prediction: str, steps: Jumps, ends: Jumps) -> StepTable:
    """The rows of Heun's steps. A step may add fresh noise at its end, up to a higher level.

    For x / sqrt(alphas_cumprod), and with r the ratio of the sigmas before and after the step, the correction adds
    (r - 1) / 2 (x0 - x0 of the Euler row), so that the sample at the step's start is not needed.

    Args:
        prediction: see ddpm.
        steps: each step from its start to the level that it reaches after its noise is added.
        ends: for each step but the last, from the end of Heun's step, where the model is called, to the level that
            `steps` reaches. The last step is one Euler row.
    """
    end = torch.cat([ends.now, steps.after[-1:]])
    # The standard deviation of the noise that leads from the end of Heun's step up to the level after the noise.
    s = (1 - steps.after / end).sqrt()
    twice = steps.now > 0
    twice[-1] = False
    has_second_row = twice[:-1]
    calls = Jumps(
        ends.timestep[has_second_row], ends.now[has_second_row], ends.after[has_second_row], ends.alphas[has_second_row]
    )
    half_change = (sigmas_of(steps.now[twice]) / sigmas_of(calls.now) - 1) / 2
    return two_calls(
        prediction, steps, s, twice, Correction(calls, half_change, torch.ones_like(half_change), -half_change)
    )
