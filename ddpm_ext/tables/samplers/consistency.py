"""Samplers for distilled models, which predict the clean sample in one step and add noise to it again."""

from __future__ import annotations

from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.spacing import Grid, Jumps
from ddpm_ext.tables.step_table import StepTable

__all__ = ["lcm"]

SIGMA_DATA = 0.5


def lcm(grid: Grid | Jumps, *, prediction: str = "eps", timestep_scaling: float = 10.0) -> StepTable:
    """Multistep sampling of a latent consistency model: Luo et al. 2023, section 4, as diffusers has it.

    The consistency function f = c_skip x + c_out x0 predicts the clean sample. The next sample is f with fresh noise to
    the level where the step arrives. c_skip is 1 at timestep 0, and next to 0 from timestep 1 on.

    Args:
        grid: descending.
        prediction: as for ddpm.
        timestep_scaling: by what the timestep is multiplied in c_skip and c_out; 10 in diffusers.

    Raises:
        ValueError: an unknown `prediction`.
    """
    a, b = coefficients.x0(grid, prediction)
    scaled = timestep_scaling * grid.timestep.double()
    total = scaled**2 + SIGMA_DATA**2
    skip, out = SIGMA_DATA**2 / total, scaled / total.sqrt()
    signal = grid.after.sqrt()
    return StepTable(
        grid.timestep,
        a,
        b,
        c0=signal * out,
        c1=signal * skip,
        s=(1 - grid.after).sqrt(),
        g0=coefficients.score(grid),
        now=grid.now,
        after=grid.after,
    )
