"""Schedules and grids for the tests of samplers."""

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps

IDS = ("linspace", "trailing", "karras")  # the names of the grids that grids() returns


def schedule(name="linear", timesteps=1000):
    """The betas and the alphas_cumprod of a schedule."""
    betas = make_betas(name, timesteps)
    return betas, (1 - betas).cumprod(0)


def grids():
    """Three grids for schedules of 1,000 timesteps."""
    _, levels = schedule("scaled_linear")
    return [
        make_grid(levels, spaced_timesteps(1000, 25)),
        make_grid(levels, spaced_timesteps(1000, 10, "trailing"), final=levels[0].item()),
        karras_grid(levels, 12),
    ]
