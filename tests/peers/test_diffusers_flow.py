"""diffusers' FlowMatchEulerDiscreteScheduler beside the schedule "flow": its sigmas, its loop, what it trains with."""

import pytest
import torch

from ddpm_ext import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 2, 5)


def schedulers(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


@pytest.mark.parametrize("steps", [1, 5, 28])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta_sigmas"])
def test_spacings(steps, spacing):
    """A loop over a flow has their sigmas and timesteps."""
    scheduler = schedulers(**{f"use_{spacing.removesuffix('_sigmas')}_sigmas": True})
    scheduler.set_timesteps(steps)
    process = GaussianDiffusion(1000, "flow", prediction="flow")
    table = make_loop_rows(process, LoopOptions(sampler="euler", spacing=spacing, steps=steps)).table
    close = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close(torch.cat([table.noise_now, table.noise_after[-1:]]), scheduler.sigmas, **close)
    torch.testing.assert_close(table.timestep, scheduler.timesteps, **close)
    torch.testing.assert_close(table.signal_now + table.noise_now, torch.ones_like(table.noise_now))


@pytest.mark.parametrize("steps", [1000, 28])
def test_a_process_is_their_schedule(device, steps):
    """beta_schedule="flow" has their levels and timesteps; a loop of 28 steps visits the nearest of these."""
    gd, scheduler = GaussianDiffusion(1000, "flow", prediction="flow"), schedulers()
    torch.testing.assert_close(gd.schedule.timestep.flip(0), scheduler.timesteps.double(), rtol=1e-6, atol=0)
    scheduler.set_timesteps(steps, device=device)
    told, x = [], torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)

    def model(x, t):
        told.append(t[0].item())
        return torch.cos(x)

    options = {"sampler": "euler", "steps": steps, "spacing": "linspace", "clip_denoised": False}
    found = gd.p_sample_loop(model, SHAPE, noise=x, progress=False, record="last", **options)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.cos(x), t, x).prev_sample
    tolerance = 2e-5 if steps == 1000 else 2e-3
    torch.testing.assert_close(found, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        torch.tensor(told), scheduler.timesteps.cpu(), rtol=0, atol=1e-3 if steps == 1000 else 0.51
    )
    x_0, z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(7)).to(device)
    at = torch.tensor([999, 500, 3], device=device)
    scheduler = schedulers()
    noised = scheduler.scale_noise(x_0, scheduler.timesteps[999 - at.cpu()].to(device), z)
    torch.testing.assert_close(gd.q_sample(x_0, at, z), noised, rtol=1e-6, atol=1e-6)
