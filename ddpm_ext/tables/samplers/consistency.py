"""Samplers for consistency models, which are distilled: each step predicts the clean sample and adds noise to it."""

from __future__ import annotations

import torch

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.ddim import implicit
from ddpm_ext.tables.samplers.eta import check_eta
from ddpm_ext.tables.step_table import StepTable

__all__ = ["lcm", "tcd"]

SIGMA_DATA = 0.5  # the standard deviation of the data in c_skip and c_out


@at_any_scale
def lcm(grid: Grid | Jumps, *, prediction: str = "eps", timestep_scaling: float = 10.0) -> StepTable:
    """Multistep sampling of a latent consistency model: Luo et al. 2023, section 4. diffusers has the same samples.

    The consistency function f = c_skip x + c_out x0 predicts the clean sample. The next sample is f plus fresh noise at
    the level where the step arrives. c_skip is 1 at timestep 0, and nearly 0 from timestep 1 on.

    Args:
        grid: descending.
        prediction: see ddpm.
        timestep_scaling: the factor of the timestep in c_skip and c_out, 10 in diffusers.

    Raises:
        ValueError: an unknown `prediction`.

    Examples:
        >>> table = lcm(grid)  # for sampler= of a loop
    """
    scaled = timestep_scaling * grid.timestep.double()
    power = scaled**2 + SIGMA_DATA**2
    skip, out = SIGMA_DATA**2 / power, scaled / power.sqrt()
    signal, s = grid.after.sqrt(), (1 - grid.after).sqrt()
    return coefficients.rows(grid, prediction, c0=signal * out, c1=signal * skip, s=s)


@at_any_scale
def tcd(grid: Grid, *, prediction: str = "eps", eta: float = 0.3) -> StepTable:
    """Strategic stochastic sampling of trajectory consistency distillation: Zheng et al. 2024, as in diffusers.

    Let s be the timestep at which a step arrives. The step goes down to timestep (1 - eta) s, rounded down, and fresh
    noise leads from there up to s. Each row is that of DDIM with another sigma. The last step adds no noise.

    Args:
        grid: descending, with a schedule.
        prediction: see ddpm.
        eta: gamma of the paper, in [0, 1]. 0 is the deterministic sampler. With 1, fresh noise replaces the model's.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: an unknown `prediction`, an `eta` out of range, or, for an `eta` above 0 and more than one step, a
            grid without a schedule.

    Examples:
        >>> table = tcd(grid, eta=0.3)  # for sampler= of a loop
    """
    eta = check_eta(eta)
    if eta > 1:
        raise ValueError(f"eta is {eta}, expected 0 <= eta <= 1 for tcd")
    sigma = torch.zeros_like(grid.now)
    if eta > 0 and len(grid) > 1:
        if grid.schedule is None:
            raise ValueError(
                "grid has no schedule, in which tcd counts timesteps: expected one, as make_grid's, or eta 0"
            )
        between = grid.schedule[((1 - eta) * grid.timestep[1:]).floor().long()]
        # If the grid's levels have less noise than the schedule's first level, the difference is negative.
        sigma[:-1] = (1 - grid.after[:-1] / between).clamp(min=0).sqrt()
    return implicit(grid, prediction, sigma, keep_eps=True)
