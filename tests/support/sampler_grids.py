"""Grids for the tests of samplers' rows: to clean data, to a level with noise, and between the timesteps."""

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps

PREDICTIONS = ("eps", "x0", "v")


def schedule(name="linear", timesteps=1000):
    betas = make_betas(name, timesteps)
    return betas, (1 - betas).cumprod(0)


def grids():
    _, levels = schedule("scaled_linear")
    trailing = make_grid(levels, spaced_timesteps(1000, 10, "trailing"), final=levels[0].item())
    return [make_grid(levels, spaced_timesteps(1000, 25)), trailing, karras_grid(levels, 12)]
