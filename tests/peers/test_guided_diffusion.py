"""guided-diffusion's steps in float64, given the same noise. Its tables are float64, and so is its arithmetic here.

Gradients, DDIM and its inverse are in test_accelerated_guided_diffusion.py, whose objects take their steps by our rows.
"""

import pytest
import torch
from support.accelerated_guided import VARIANCES, make
from support.choices import for_many

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim
from ddpm_ext.tables.spacing import section_timesteps

peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
respace = pytest.importorskip("guided_diffusion.respace")

SHAPE = (5, 3, 4, 6)
T = [0, 1, 17, 500, 999]
clips = pytest.mark.parametrize("clip", [True, False])
variances = pytest.mark.parametrize("variance", [variance.lower() for variance in VARIANCES])
predictions = pytest.mark.parametrize("prediction", ["eps", "x0"])


@pytest.fixture
def inputs(device, monkeypatch):
    """x, m, v and z of SHAPE, and t. guided-diffusion, computing in float64, draws z."""
    values = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    x, m, v, z = values.unbind(0)
    monkeypatch.setattr(peer.th, "randn_like", lambda _: z.double())
    monkeypatch.setattr(peer, "_extract_into_tensor", lambda values, t, shape: wide(values, t).expand(shape))
    return x, m, v, z, torch.tensor(T, device=device)


def output(variance, m, v):
    if variance.startswith("fixed"):
        return m
    return torch.cat([m, v - 3 if variance == "learned" else v.clamp(-1, 1)], 1)


def close(found, expected, size):
    """Checks that the difference is a few float32 ulps of the terms' sizes."""
    assert found.dtype == torch.float32 and expected.dtype in (torch.float64, torch.float32)
    error = (found.double() - expected.double()).abs() / size
    assert (error <= 4 * 2.0**-23).all(), error.max() * 2**23  # measured 1.3, factor 3


def wide(values, t):
    return torch.from_numpy(values).to(t.device)[t].reshape(-1, 1, 1, 1)


def at(values, t):
    return wide(values.numpy(), t)


def sizes(gd, x, m, t):
    """The sizes of the terms of x0 and of the posterior's mean."""
    x0 = m.abs()
    if gd.prediction == "eps":
        x0 = at(gd.sqrt_recip_alphas_cumprod, t) * x.abs() + at(gd.sqrt_recipm1_alphas_cumprod, t) * m.abs()
    return x0, at(gd.posterior_mean_coef1, t) * x0 + at(gd.posterior_mean_coef2, t) * x.abs()


@clips
@variances
@predictions
def test_a_step(inputs, prediction, variance, clip):
    """p_mean_variance, and p_sample with the same noise."""
    x, m, v, z, t = inputs
    gd = GaussianDiffusion(1000, prediction=prediction, variance=variance)
    theirs = make(prediction, variance, betas=gd.betas)
    told = output(variance, m, v)
    expected = theirs.p_mean_variance(lambda *_: told.double(), x.double(), t, clip)
    mean, var, log_var = gd.p_mean_variance(lambda *_: told, x, t, clip)
    size, spread = sizes(gd, x, m, t)[1], (expected["log_variance"] / 2).exp()
    close(mean, expected["mean"], size)
    # at t = 0 guided-diffusion clips a fixed one to the variance at t = 1, ddpm_ext to 1e-20; no noise is added there
    after = slice(1 if variance == "fixed_small" else 0, None)
    torch.testing.assert_close(var.expand(SHAPE)[1:].double(), expected["variance"][1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        log_var.expand(SHAPE)[after].double(), expected["log_variance"][after], rtol=1e-6, atol=1e-6
    )
    expected = theirs.p_sample(lambda *_: told.double(), x.double(), t, clip)["sample"]
    close(gd.p_sample(lambda *_: told, x, t, clip, noise=z), expected, size + 20 * spread * z.abs())


def both(x, t, **_):
    m = x * 0.5 - (t.float() / 2000).reshape(-1, 1, 1, 1) * x.clamp(-1, 1)
    return torch.cat([m, (x * 0.7).clamp(-1, 1)], 1)


def cond_fn(x, t, **_):
    return (0.3 - x) * 0.5


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("spacing", ["ddim25", "10,15,20"])
def test_loop_over_some_of_the_timesteps(device, monkeypatch, sampler, spacing, guided):
    """SpacedDiffusion's loop, with a learned range, a gradient and a denoised_fn."""
    gd = GaussianDiffusion(1000, variance="learned_range")
    sections = spacing if spacing.startswith("ddim") else [int(n) for n in spacing.split(",")]
    timesteps = section_timesteps(1000, sections).tolist()
    assert set(timesteps) == respace.space_timesteps(1000, spacing)
    theirs = make(variance="learned_range", spacing=spacing, betas=gd.betas)
    rng, guide = Philox(3), {"cond_fn": cond_fn if guided else None, "denoised_fn": lambda x0: x0 * 0.9}
    x = start = randn(SHAPE, rng, stream=1, device=device)
    for i in range(len(timesteps) - 1, -1, -1):
        z = randn(SHAPE, rng, draw=timesteps[len(timesteps) - 1 - i], device=device)
        monkeypatch.setattr(peer.th, "randn_like", lambda _, z=z: z)
        step = theirs.p_sample if sampler == "ddpm" else theirs.ddim_sample
        x = step(both, x, torch.full((5,), i, device=device), model_kwargs={}, **guide)["sample"]
    chosen = {"sampler": "ddpm", "spacing": spacing}
    if sampler == "ddim":
        grid = make_grid(gd.alphas_cumprod, timesteps)
        chosen = {"sampler": ddim(grid, keep_eps=False)}
    ours = gd.p_sample_loop(both, SHAPE, rng=rng, record="last", progress=False, device=device, **chosen, **guide)
    assert not torch.equal(ours, start)
    # measured 7e-5 by a gradient at t = 0, where learned ranges start elsewhere; 2.8e-6 without
    torch.testing.assert_close(ours, x, rtol=0, atol=3e-4 if guided and sampler == "ddpm" else 1e-5)


@for_many(100)
def test_sections(choose):
    """space_timesteps, whose positions are added up in floating point."""
    timesteps = choose.integer(10, 4000)
    counts = choose.several(lambda: choose.integer(1, timesteps // 5), 1, 5)
    assert section_timesteps(timesteps, counts).flip(0).tolist() == sorted(respace.space_timesteps(timesteps, counts))
