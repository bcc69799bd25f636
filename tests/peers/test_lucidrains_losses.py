"""denoising-diffusion-pytorch's p_losses, with the same noise, timesteps and model: each sample's loss and the
gradients.

Its tables are made of float64 betas and rounded to float32; ours are made of the same betas.
"""

import pytest
import torch
from support.peer_training import RNG, SHAPE, check, drawn, make_inputs, step

from ddpm_ext import GaussianDiffusion

peer = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

OBJECTIVES = {"eps": "pred_noise", "x0": "pred_x0", "v": "pred_v"}


class WideTorch:
    """torch, but their buffers become float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def p_losses(schedule, prediction, min_snr, **options):
    def losses(model, x, t, z):
        theirs = peer.GaussianDiffusion(
            model,
            image_size=SHAPE[2:],
            timesteps=1000,
            objective=OBJECTIVES[prediction],
            beta_schedule=schedule,
            auto_normalize=False,
            min_snr_loss_weight=min_snr,
            **options,
        ).to(x.device)
        return theirs.p_losses(x, t, noise=z, loss_reduction="none")

    return losses


@pytest.fixture
def truth(monkeypatch):
    """One of their steps in float64, tables included."""

    def take(losses, *inputs):
        with monkeypatch.context() as patch:
            patch.setattr(peer, "torch", WideTorch())
            return step(losses, *inputs, torch.float64)

    return take


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("prediction", OBJECTIVES)
@pytest.mark.parametrize(("min_snr", "noise"), [(False, "given"), (True, "drawn")])
def test_p_losses(truth, device, schedule, prediction, min_snr, noise):
    """Without min_snr, an error of eps counts the same at all timesteps, whatever the model predicts."""
    x, t = make_inputs(device)
    z = drawn(t)
    gd = GaussianDiffusion(1000, getattr(peer, f"{schedule}_beta_schedule")(1000), prediction=prediction)
    theirs = p_losses(schedule, prediction, min_snr)

    def ours(model, x, t, z):
        how = {"noise": z} if noise == "given" else {"rng": RNG}
        return gd.train_losses(model, x, t, weighting="min_snr" if min_snr else "snr", reduction="none", **how)

    check(step(ours, x, t, z, torch.float32), step(theirs, x, t, z, torch.float32), truth(theirs, x, t, z))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_betas(schedule):
    """Of the schedules with the same names; their sigmoid begins from float32 numbers."""
    theirs = getattr(peer, f"{schedule}_beta_schedule")(1000)
    ours = GaussianDiffusion(1000, schedule).betas
    torch.testing.assert_close(ours, theirs, rtol=4e-5 if schedule == "sigmoid" else 1e-9, atol=0)
