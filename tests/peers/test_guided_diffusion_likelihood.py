"""guided-diffusion's bound in float64, given the same noise. Its tables are float64, and so is its arithmetic here."""

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.ops.noise import STREAM_FORWARD

peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
losses = pytest.importorskip("guided_diffusion.losses")

SHAPE = (4, 3, 4, 6)
TIMESTEPS = 60
PREDICTIONS = {
    "eps": peer.ModelMeanType.EPSILON,
    "x0": peer.ModelMeanType.START_X,
    "x_prev": peer.ModelMeanType.PREVIOUS_X,
}
VARIANCES = {
    "fixed_small": peer.ModelVarType.FIXED_SMALL,
    "fixed_large": peer.ModelVarType.FIXED_LARGE,
    "learned": peer.ModelVarType.LEARNED,
    "learned_range": peer.ModelVarType.LEARNED_RANGE,
}
RNG = Philox(5)

variances = pytest.mark.parametrize("variance", VARIANCES)
# its mean of an "x_prev" is the model's, whatever the clip of x_0
clipped = pytest.mark.parametrize(
    ("prediction", "clip"),
    [("eps", True), ("eps", False), ("x0", True), ("x0", False), ("x_prev", False)],
)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    def wide(values, t, shape):
        return torch.from_numpy(values).to(t.device)[t].reshape(-1, 1, 1, 1).expand(shape)

    monkeypatch.setattr(peer, "_extract_into_tensor", wide)


@pytest.fixture
def exact_cdf(monkeypatch):
    """The exact normal distribution function in place of its approximation, which is wrong by up to 3e-4."""
    monkeypatch.setattr(losses, "approx_standard_normal_cdf", torch.special.ndtr)


def pair(prediction, variance):
    gd = GaussianDiffusion(TIMESTEPS, "cosine", prediction=prediction, variance=variance, backend="reference")
    theirs = peer.GaussianDiffusion(
        betas=gd.betas.numpy(),
        model_mean_type=PREDICTIONS[prediction],
        model_var_type=VARIANCES[variance],
        loss_type=peer.LossType.RESCALED_KL,
    )
    return gd, theirs


def images(device):
    levels = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(0))
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    return (levels.double() / 127.5 - 1).to(device)


def model_of(gd, x_start):
    """A model near enough to x_start that its log-likelihood is above guided-diffusion's limit, ln 1e-12."""

    def model(x, t):
        kept = gd.alphas_cumprod.to(x.device)[t].reshape(-1, 1, 1, 1)
        x0 = x_start + 0.01 * torch.sin(40 * x)
        of_x0, of_x = (
            table.to(x.device)[t].reshape(-1, 1, 1, 1) for table in (gd.posterior_mean_coef1, gd.posterior_mean_coef2)
        )
        m = {"x0": x0, "eps": (x - kept.sqrt() * x0) / (1 - kept).sqrt(), "x_prev": of_x0 * x0 + of_x * x}[
            gd.prediction
        ]
        if gd.variance == "learned":
            return torch.cat([m, -4 + torch.cos(3 * x)], 1)
        return m if gd.variance.startswith("fixed") else torch.cat([m, torch.cos(3 * x)], 1)

    return model


def test_their_cdf_is_near(device):
    """Where the log-likelihood is not far below, the approximation changes it by some hundredths of a bit."""
    gd, theirs = pair("eps", "fixed_large")
    x_start = images(device)
    x_t = gd.q_sample(x_start, 0, rng=RNG)
    model = model_of(gd, x_start)
    expected = theirs._vb_terms_bpd(model, x_start, x_t, torch.zeros(len(x_start), dtype=torch.int64, device=device))
    found = gd.vlb_terms(model, x_start, 0, rng=RNG)
    torch.testing.assert_close(found.output, expected["output"], rtol=0, atol=0.01)
    assert not torch.allclose(found.output, expected["output"], rtol=0, atol=1e-9)


@variances
@clipped
def test_whole_bound(device, exact_cdf, monkeypatch, prediction, clip, variance):
    """Their columns run from the last timestep to the first."""
    gd, theirs = pair(prediction, variance)
    x_start = images(device)
    drawn = iter(range(TIMESTEPS - 1, -1, -1))
    monkeypatch.setattr(
        peer.th,
        "randn_like",
        lambda x: randn(SHAPE, RNG, stream=STREAM_FORWARD, draw=next(drawn), device=device).to(x.dtype),
    )
    model = model_of(gd, x_start)
    expected = theirs.calc_bpd_loop(model, x_start, clip_denoised=clip)
    found = gd.bits_per_dim(model, x_start, rng=RNG, clip_denoised=clip)
    assert next(drawn, None) is None
    torch.testing.assert_close(found.total, expected["total_bpd"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.prior, expected["prior_bpd"], rtol=1e-9, atol=0)
    for ours, name in ((found.vlb, "vb"), (found.x_start_mse, "xstart_mse"), (found.mse, "mse")):
        torch.testing.assert_close(ours, expected[name].flip(1), rtol=1e-5, atol=1e-6)
