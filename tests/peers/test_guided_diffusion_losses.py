"""guided-diffusion's training_losses, with the same noise, timesteps and model: each sample's loss and the
gradients.

These tests run where a checkout of it is on PYTHONPATH.
"""

import functools

import pytest
import torch
from support.peer_training import RNG, Net, check, drawn, make_inputs, step

from ddpm_ext import GaussianDiffusion

peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
peer_losses = pytest.importorskip("guided_diffusion.losses")

PREDICTIONS = {
    "eps": peer.ModelMeanType.EPSILON,
    "x0": peer.ModelMeanType.START_X,
    "x_prev": peer.ModelMeanType.PREVIOUS_X,
}
FIXED = {"fixed_small": peer.ModelVarType.FIXED_SMALL, "fixed_large": peer.ModelVarType.FIXED_LARGE}
LEARNED = {"learned": peer.ModelVarType.LEARNED, "learned_range": peer.ModelVarType.LEARNED_RANGE}
VARIANCES = FIXED | LEARNED
# Ours of theirs, and how much of the bound comes to the error.
LOSSES = {
    "MSE": {"loss": "mse", "vlb_weight": 1 / 1000},
    "RESCALED_MSE": {"loss": "mse"},
    "KL": {"loss": "vlb"},
    "RESCALED_KL": {"loss": "rescaled_vlb"},
}


def make(betas, prediction, variance, loss="MSE"):
    return peer.GaussianDiffusion(
        betas=betas.numpy(),
        model_mean_type=PREDICTIONS[prediction],
        model_var_type=VARIANCES[variance],
        loss_type=peer.LossType[loss],
    )


@pytest.fixture
def truth(monkeypatch):
    """One of their steps in float64, which reads its float64 tables without rounding."""

    def extract(values, t, shape):
        return torch.from_numpy(values).to(t.device)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def take(losses, x, t, z, **options):
        with monkeypatch.context() as patch:
            patch.setattr(peer, "_extract_into_tensor", extract)
            return step(losses, x, t, z, torch.float64, **options)

    return take


# ---------------------------------------------------------------------------------------------- fixed variances


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize(("schedule", "noise"), [("linear", "given"), ("cosine", "drawn")])
def test_mse(truth, device, schedule, prediction, variance, noise):
    """LossType.MSE, with the betas of their schedule."""
    x, t = make_inputs(device)
    z = drawn(t)
    betas = torch.from_numpy(peer.get_named_beta_schedule(schedule, 1000))
    theirs, gd = make(betas, prediction, variance), GaussianDiffusion(1000, betas, prediction=prediction)

    def losses(model, x, t, z):
        return theirs.training_losses(model, x, t, noise=z)["loss"]

    def ours(model, x, t, z):
        how = {"noise": z} if noise == "given" else {"rng": RNG}
        return gd.train_losses(model, x, t, reduction="none", **how)

    check(step(ours, x, t, z, torch.float32), step(losses, x, t, z, torch.float32), truth(losses, x, t, z))


# ------------------------------------------------------------------------------------------ the variational bound


@pytest.fixture
def exact_bins(monkeypatch):
    """The exact normal distribution function in place of their approximation, which is wrong by up to 2e-4."""
    monkeypatch.setattr(peer_losses, "approx_standard_normal_cdf", torch.special.ndtr)


def check_bound(truth, inputs, prediction, variance, loss):
    x, t = inputs
    z = drawn(t)
    betas = torch.from_numpy(peer.get_named_beta_schedule("linear", 1000))
    theirs = make(betas, prediction, variance, loss)
    gd = GaussianDiffusion(1000, betas, prediction=prediction, variance=variance)
    net = functools.partial(Net, outputs=2 if variance in LEARNED else 1, skip=prediction != "eps")

    def losses(model, x, t, z):
        return theirs.training_losses(model, x, t, noise=z)["loss"]

    def ours(model, x, t, z):
        return gd.train_losses(model, x, t, rng=RNG, reduction="none", **LOSSES[loss])

    f32 = torch.float32
    check(step(ours, x, t, z, f32, net), step(losses, x, t, z, f32, net), truth(losses, x, t, z, net=net))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("variance", "loss"),
    [(v, loss) for v in LEARNED for loss in LOSSES] + [(v, loss) for v in FIXED for loss in ("KL", "RESCALED_KL")],
)
def test_bound(truth, exact_bins, device, prediction, variance, loss):
    """The divergence at all timesteps but the last."""
    check_bound(truth, make_inputs(device, [1, 2, 17, 500, 998, 999]), prediction, variance, loss)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("variance", "loss"), [(v, "RESCALED_MSE") for v in LEARNED] + [(v, "KL") for v in VARIANCES])
def test_decoder(truth, exact_bins, device, prediction, variance, loss):
    """The likelihood of the bins of 8 bits, at t = 0."""
    check_bound(truth, make_inputs(device, [0] * 6), prediction, variance, loss)
