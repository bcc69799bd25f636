"""guided-diffusion's steps in float64, given the same noise. Its tables are float64, and so is its arithmetic here.

Gradients, DDIM and its inverse are in test_accelerated_guided_diffusion.py, whose objects take their steps by our rows.
"""

import pytest
import torch
from support.accelerated_guided import make
from support.choices import for_many

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim
from ddpm_ext.tables.spacing import section_timesteps

peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
respace = pytest.importorskip("guided_diffusion.respace")

SHAPE = (5, 3, 4, 6)


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
