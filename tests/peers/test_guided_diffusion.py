"""guided-diffusion's choice of timesteps, and its bound of a whole process, with the same noise and model. Its steps,
loops and training_losses are in test_accelerated_guided_diffusion.py and the files beside it.

These tests run where a checkout of it is found (support/checkouts.py).
"""

import pytest
import torch
from support.accelerated_guided import in_float64, make
from support.choices import for_many
from support.peer_training import RNG

from ddpm_ext import GaussianDiffusion, randn
from ddpm_ext.ops.noise import STREAM_FORWARD
from ddpm_ext.tables.spacing import section_timesteps

peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
peer_losses = pytest.importorskip("guided_diffusion.losses")
respace = pytest.importorskip("guided_diffusion.respace")


@for_many(100)
def test_sections(choose):
    """space_timesteps, whose positions are added up in floating point."""
    timesteps = choose.integer(10, 4000)
    counts = choose.several(lambda: choose.integer(1, timesteps // 5), 1, 5)
    assert section_timesteps(timesteps, counts).flip(0).tolist() == sorted(respace.space_timesteps(timesteps, counts))


@pytest.fixture
def exact_bins(monkeypatch):
    """The exact normal distribution function in place of their approximation, which is wrong by up to 2e-4."""
    monkeypatch.setattr(peer_losses, "approx_standard_normal_cdf", torch.special.ndtr)


SHAPE = (4, 3, 4, 6)
TIMESTEPS = 60
# its mean of an "x_prev" is the model's, whatever the clip of x_0
clipped = pytest.mark.parametrize(
    ("prediction", "clip"), [("eps", True), ("eps", False), ("x0", True), ("x0", False), ("x_prev", False)]
)


def pair(prediction, variance):
    gd = GaussianDiffusion(TIMESTEPS, "cosine", prediction=prediction, variance=variance, backend="reference")
    return gd, make(prediction, variance, "RESCALED_KL", betas=gd.betas)


def images(device):
    levels = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(0))
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    return (levels.double() / 127.5 - 1).to(device)


def model_of(gd, x_start):
    """A model near enough to x_start that its log-likelihood is above guided-diffusion's limit, ln 1e-12."""

    def model(x, t):
        kept = gd.alphas_cumprod.to(x.device)[t].reshape(-1, 1, 1, 1)
        x0 = x_start + 0.01 * torch.sin(40 * x)
        c0, c1 = (
            table.to(x.device)[t].reshape(-1, 1, 1, 1) for table in (gd.posterior_mean_coef1, gd.posterior_mean_coef2)
        )
        m = {"x0": x0, "eps": (x - kept.sqrt() * x0) / (1 - kept).sqrt(), "x_prev": c0 * x0 + c1 * x}[gd.prediction]
        if gd.variance == "learned":
            return torch.cat([m, -4 + torch.cos(3 * x)], 1)
        return m if gd.variance.startswith("fixed") else torch.cat([m, torch.cos(3 * x)], 1)

    return model


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@clipped
def test_whole_bound(device, exact_bins, monkeypatch, prediction, clip, variance):
    """Their columns run from the last timestep to the first."""
    gd, theirs = pair(prediction, variance)
    x_start = images(device)
    drawn = iter(range(TIMESTEPS - 1, -1, -1))
    own = {"stream": STREAM_FORWARD, "device": device}
    monkeypatch.setattr(peer.th, "randn_like", lambda x: randn(SHAPE, RNG, draw=next(drawn), **own).to(x.dtype))
    model = model_of(gd, x_start)
    with in_float64():
        expected = theirs.calc_bpd_loop(model, x_start, clip_denoised=clip)
    found = gd.bits_per_dim(model, x_start, rng=RNG, clip_denoised=clip)
    assert next(drawn, None) is None
    torch.testing.assert_close(found.total, expected["total_bpd"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.prior, expected["prior_bpd"], rtol=1e-9, atol=0)
    for ours, name in ((found.vlb, "vb"), (found.x_start_mse, "xstart_mse"), (found.mse, "mse")):
        torch.testing.assert_close(ours, expected[name].flip(1), rtol=1e-5, atol=1e-6)
