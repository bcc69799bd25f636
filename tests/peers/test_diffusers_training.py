"""The densities of timesteps and the loss weightings of diffusers' training scripts for Stable Diffusion 3."""

import pytest
import torch

from ddpm_ext.losses.timestep_samplers import LogitNormal, Mode
from ddpm_ext.tables.weightings import WEIGHTINGS

training_utils = pytest.importorskip("diffusers.training_utils")


@pytest.mark.parametrize(
    "sampler, name, options",
    [
        (LogitNormal, "logit_normal", {"logit_mean": -0.4, "logit_std": 1.3}),
        (Mode, "mode", {"mode_scale": 1.29}),
        (Mode, "mode", {"mode_scale": -0.5}),
    ],
)
def test_timesteps(monkeypatch, sampler, name, options):
    """Of the same uniform numbers. Theirs index a list of timesteps that descends; ours are times, 1 for pure noise."""
    own = sampler(1000, **options)
    positions = own._positions(torch.arange(500), 500, seed=7, iteration=0)
    monkeypatch.setattr(torch, "rand", lambda **_: 1 - positions)
    monkeypatch.setattr(torch, "normal", lambda mean, std, **_: mean + std * torch.special.ndtri(positions))
    times = training_utils.compute_density_for_timestep_sampling(name, 500, **options)
    assert torch.equal(own.sample(500, seed=7, iteration=0)[0], (times * 1000).long())


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weightings(name):
    """Of the error of a flow's velocity, which is that of x_0 divided by sigma."""
    sigma = torch.linspace(0.001, 1, 200, dtype=torch.float64)
    ours = WEIGHTINGS[name](((1 - sigma) / sigma) ** 2) * sigma**2
    theirs = training_utils.compute_loss_weighting_for_sd3(name, sigma)
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-6, atol=0)
