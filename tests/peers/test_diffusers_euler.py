"""diffusers' Euler schedulers, given the same noise. Their samples are ours divided by sqrt(alphas_cumprod)."""

import importlib

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import euler, euler_ancestral
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 2, 5)
STEPS = 25
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Their sigmas are float32 of float32 alphas_cumprod, and a step down is a difference of two of them.
RELATIVE = 2e-5  # of the terms' size, measured 6.0e-6 (karras), factor 3

predictions = pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
spacings = pytest.mark.parametrize("spacing", ["leading", "trailing"])


def make(name, **options):
    scheduler = getattr(diffusers, name)(**OPTIONS, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler, GaussianDiffusion(1000, scheduler.betas)


def compare(monkeypatch, scheduler, grid, table, device):
    """Compares steps, each from a sample of its own."""
    module = importlib.import_module(type(scheduler).__module__)
    packed = table.packed(device)
    for i, t in enumerate(scheduler.timesteps):
        x, m, z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(i)).to(device).unbind(0)
        root, after = grid.now[i].sqrt().item(), grid.after[i].sqrt().item()
        monkeypatch.setattr(module, "randn_tensor", lambda *_, z=z, **__: z)
        outer = x / root
        torch.testing.assert_close(scheduler.scale_model_input(outer, t), x, rtol=1e-5, atol=1e-6)
        expected = scheduler.step(m, t, outer).prev_sample * after
        ours = ops.reverse_step(x, m, packed, i, clip=None, noise=z)
        a, b, c0, c1, _, s = (abs(factor) for factor in table[i][1:7])
        size = c0 * (a * x.abs() + b * m.abs()) + c1 * x.abs() + s * z.abs()
        assert ((ours - expected).abs() <= RELATIVE * size).all(), (i, ((ours - expected).abs() / size).max())


@predictions
@spacings
def test_euler(monkeypatch, prediction, theirs, spacing, device):
    scheduler, gd = make("EulerDiscreteScheduler", prediction_type=theirs, timestep_spacing=spacing)
    timesteps = spaced_timesteps(1000, STEPS, spacing)
    assert scheduler.timesteps.tolist() == timesteps.tolist()
    grid = make_grid(gd.alphas_cumprod, timesteps)
    compare(monkeypatch, scheduler, grid, euler(grid, prediction=prediction), device)


@predictions
def test_euler_on_karras_sigmas(monkeypatch, prediction, theirs, device):
    scheduler, gd = make("EulerDiscreteScheduler", prediction_type=theirs, use_karras_sigmas=True)
    grid = karras_grid(gd.alphas_cumprod, STEPS)
    compare(monkeypatch, scheduler, grid, euler(grid, prediction=prediction), device)


@predictions
@spacings
def test_euler_ancestral(monkeypatch, prediction, theirs, spacing, device):
    scheduler, gd = make("EulerAncestralDiscreteScheduler", prediction_type=theirs, timestep_spacing=spacing)
    grid = make_grid(gd.alphas_cumprod, spaced_timesteps(1000, STEPS, spacing))
    compare(monkeypatch, scheduler, grid, euler_ancestral(grid, prediction=prediction), device)


@pytest.mark.parametrize("name, sampler", [("EulerDiscrete", "euler"), ("EulerAncestralDiscrete", "euler_ancestral")])
def test_loop(monkeypatch, name, sampler, device):
    """From the same start to the same image."""
    scheduler, gd = make(f"{name}Scheduler", timestep_spacing="trailing")
    module = importlib.import_module(type(scheduler).__module__)
    rng = Philox(1)

    def model(x, t):
        return 0.9 * x

    x = randn(SHAPE, rng, stream=1, device=device) / gd.alphas_cumprod[999].sqrt().item()
    for t in scheduler.timesteps.tolist():
        z = randn(SHAPE, rng, draw=int(t), device=device)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, z=z, **__: z)
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    options = {"sampler": sampler, "steps": STEPS, "spacing": "trailing", "clip_denoised": False, "rng": rng}
    ours = gd.p_sample_loop(model, SHAPE, record="last", progress=False, device=device, **options)
    torch.testing.assert_close(ours, x, rtol=0, atol=3e-6)  # measured 9.5e-7, factor 3
