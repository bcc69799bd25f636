"""denoising-diffusion-pytorch's schedules and the weights of its losses beside ours of the same names. Its losses and
their gradients are in test_accelerated_denoising_diffusion.py."""

import pytest
import torch
from support.accelerated_denoising import PREDICTIONS, make, peer

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.weightings import weights

schedules = pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])


@schedules
@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize(("min_snr", "weighting"), [(False, "snr"), (True, "min_snr")])
def test_weights(schedule, objective, min_snr, weighting):
    """Without min_snr, an error of eps counts the same at all timesteps, whatever the model predicts."""
    theirs = make(objective, timesteps=1000, beta_schedule=schedule, min_snr_loss_weight=min_snr).loss_weight
    levels = (1 - getattr(peer, f"{schedule}_beta_schedule")(1000)).cumprod(0)
    found = weights(levels, PREDICTIONS[objective], weighting)
    torch.testing.assert_close(found, theirs.expand(1000).double(), rtol=1e-6, atol=1e-12)


@schedules
def test_betas(schedule):
    """Of the schedules with the same names; their sigmoid begins from float32 numbers."""
    theirs = getattr(peer, f"{schedule}_beta_schedule")(1000)
    ours = GaussianDiffusion(1000, schedule).betas
    torch.testing.assert_close(ours, theirs, rtol=4e-5 if schedule == "sigmoid" else 1e-9, atol=0)
