"""Schedules and grids that the tests of samplers share."""

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps

IDS = ("linspace", "trailing", "karras")  # of `grids`


def schedule(name="linear", timesteps=1000):
    """Its betas and alphas_cumprod."""
    betas = make_betas(name, timesteps)
    return betas, (1 - betas).cumprod(0)


def grids():
    _, levels = schedule("scaled_linear")
    return [
        make_grid(levels, spaced_timesteps(1000, 25)),
        make_grid(levels, spaced_timesteps(1000, 10, "trailing"), final=levels[0].item()),
        karras_grid(levels, 12),
    ]
