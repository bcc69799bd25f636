"""diffusers' sigmas beside the spacings that have them."""

import pytest
import torch

from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import ALIGN_YOUR_STEPS, SIGMA_GRIDS, linear_quadratic

diffusers = pytest.importorskip("diffusers")

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)


def scheduler(**options):
    return diffusers.EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", **options)


@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize("name, option", [("exponential", "exponential"), ("beta_sigmas", "beta")])
def test_sigmas(name, option, steps):
    euler = scheduler(**{f"use_{option}_sigmas": True})
    euler.set_timesteps(steps)
    grid = SIGMA_GRIDS[name](LEVELS, steps)
    torch.testing.assert_close((1 / grid.now - 1).sqrt().float(), euler.sigmas[:-1], rtol=1e-4, atol=0)
    torch.testing.assert_close(grid.timestep.float(), euler.timesteps, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("model, theirs", [("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_align_your_steps(model, theirs):
    sigmas = diffusers.schedulers.AysSchedules[f"{theirs}Sigmas"]
    assert list(ALIGN_YOUR_STEPS[model][:-1]) == sigmas[:-1]
    euler = scheduler()
    euler.set_timesteps(sigmas=sigmas)
    grid = SIGMA_GRIDS["align_your_steps" if model == "sd15" else "align_your_steps_sdxl"](LEVELS, 10)
    torch.testing.assert_close(grid.timestep.float(), euler.timesteps, rtol=1e-4, atol=1e-2)
    assert list(ALIGN_YOUR_STEPS["svd"][:-1]) == diffusers.schedulers.AysSchedules["StableDiffusionVideoSigmas"][:-1]


@pytest.mark.parametrize("steps", [2, 3, 8, 25, 64])
def test_linear_quadratic(steps):
    mochi = pytest.importorskip("diffusers.pipelines.mochi.pipeline_mochi")
    for threshold in (0.025, 0.1):
        theirs = torch.tensor(mochi.linear_quadratic_schedule(steps, threshold), dtype=torch.float64)
        torch.testing.assert_close(linear_quadratic(steps, threshold), theirs, rtol=1e-12, atol=1e-14)
