"""ddpm_ext.losses.likelihood for data whose best denoiser is known (gaussian.py), against formulas in float64."""

import math
import sys

import pytest
import torch
from support.comparison import backends, predictions, variances
from support.gaussian import MU, SIGMA, best_prediction, exact_model, marginal
from support.refusals import Model

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.ops.gaussians import discretized_gaussian_log_likelihood
from ddpm_ext.ops.noise import STREAM_FORWARD

TIMESTEPS = 40
BETAS = torch.linspace(2e-4, 0.3, TIMESTEPS, dtype=torch.float64)  # so that x_T has hardly any signal of x_0
SHAPE = (5, 3, 4, 6)
RNG = Philox(11, 1000)


def diffusion(prediction="eps", variance="fixed_small", backend="fused"):
    return GaussianDiffusion(TIMESTEPS, BETAS, prediction=prediction, variance=variance, backend=backend)


def images(shape=SHAPE, device="cpu", dtype=torch.float32, sigma=SIGMA):
    """Samples of N(MU, sigma^2), rounded to 8-bit levels."""
    values = MU + sigma * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((values * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1).to(device, dtype)


def mean(values):
    return values.flatten(1).mean(1)


def drawn(x_start, t):
    """The contract's noise, and the error of the best prediction of x_0, in float64 on the CPU."""
    z = randn(tuple(x_start.shape), RNG, stream=STREAM_FORWARD, draw=t).double()
    kept = diffusion().alphas_cumprod[t]
    x_t = kept.sqrt() * x_start.double().cpu() + (1 - kept).sqrt() * z
    return x_t, best_prediction(kept, x_t, "x0") - x_start.double().cpu()


def expected_term(x_start, t, variance):
    """A term of the bound. If the variances are the same, it depends on the difference of the means only."""
    gd = diffusion(variance=variance)
    _, error = drawn(x_start, t)
    x = x_start.double().cpu()
    second = gd.posterior_variance[1]
    if t == 0:
        log_p = discretized_gaussian_log_likelihood(x, mean=x + error, log_scale=second.log() / 2)
        return -mean(log_p) / math.log(2)
    q, p = gd.posterior_variance[t], gd.posterior_variance[t] if variance == "fixed_small" else gd.betas[t]
    nats = (p / q).log() / 2 + (q + (gd.posterior_mean_coef1[t] * error) ** 2) / (2 * p) - 0.5
    return mean(nats) / math.log(2)


@backends
@variances
@predictions
def test_terms(device, backend, variance, prediction):
    gd = diffusion(prediction, variance, backend)
    x_start = images(device=device)
    found = gd.bits_per_dim(exact_model(gd), x_start, rng=RNG, clip_denoised=False)
    for tensor in (found.vlb, found.x_start_mse, found.mse):
        assert tensor.shape == (len(x_start), TIMESTEPS) and tensor.dtype == torch.float32
    for t in range(TIMESTEPS):
        torch.testing.assert_close(
            found.vlb[:, t].cpu(), expected_term(x_start, t, variance).float(), rtol=1e-4, atol=1e-6
        )
        error = mean(drawn(x_start, t)[1] ** 2)
        ratio = gd.alphas_cumprod[t] / (1 - gd.alphas_cumprod[t])
        torch.testing.assert_close(found.x_start_mse[:, t].cpu(), error.float(), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.mse[:, t].cpu(), (error * ratio).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.prior, gd.prior_bpd(x_start))
    torch.testing.assert_close(found.total, found.prior + found.vlb.sum(1))


NARROW = 0.12  # so that no pixel is in an outermost bin


def best_with_variance(gd):
    """The best prediction, and the logarithm of the variance of x_{t-1} given x_t, for variance="learned"."""

    def model(x, t):
        kept, given_x0, coefficient = (
            table[t].to(x.dtype)[:, None]
            for table in (gd.alphas_cumprod, gd.posterior_variance, gd.posterior_mean_coef1)
        )
        of_x0 = NARROW**2 * (1 - kept) / marginal(kept, NARROW)[1]
        log_variance = (given_x0 + coefficient**2 * of_x0).log()
        return torch.cat([best_prediction(kept, x, gd.prediction, NARROW), log_variance.expand_as(x)], 1)

    return model


def test_bound_is_tight_where_the_model_is_exact():
    """The bound is then the negative log-likelihood of the levels, which on average is their entropy."""
    gd = diffusion(variance="learned")
    x_start = images((16, 4000), sigma=NARROW)
    assert x_start.abs().max() < 1
    found = gd.bits_per_dim(best_with_variance(gd), x_start, rng=RNG, clip_denoised=False)
    probabilities = torch.special.ndtr(((torch.arange(257).double() * 2 - 256) / 255 - MU) / NARROW).diff()
    entropy = torch.special.entr(probabilities).sum() / math.log(2)
    exact = -mean(discretized_gaussian_log_likelihood(x_start, mean=MU, log_scale=math.log(NARROW))) / math.log(2)
    assert abs(exact.mean() - entropy) < 0.015
    assert abs(found.total.mean() - exact.mean()) < 0.02  # measured 0.009 at the most over ten seeds
    worse = gd.bits_per_dim(lambda x, t: best_with_variance(gd)(x, t) + 0.2, x_start, rng=RNG, clip_denoised=False)
    assert worse.total.mean() > found.total.mean() + 0.1


def test_prior():
    gd = GaussianDiffusion(20, "linear")
    x_start = images()
    kept = gd.alphas_cumprod[-1]
    nats = (kept * x_start.double() ** 2 + (1 - kept) - 1 - (1 - kept).log()) / 2
    torch.testing.assert_close(gd.prior_bpd(x_start), (mean(nats) / math.log(2)).float())
    assert gd.prior_bpd(x_start.bfloat16()).dtype == torch.float32


def noisy(prediction="eps", learned=False, scale=0.3):
    """A bad model, whose predictions leave [-1, 1]."""

    def model(x, t):
        m = torch.sin(5 * x) * (1 + scale * torch.cos(t.to(x.dtype)).reshape(-1, *[1] * (x.dim() - 1)))
        return torch.cat([m, torch.cos(3 * x)], 1) if learned else m

    return model


@pytest.mark.parametrize("clip", [True, False, (-0.5, 0.4)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
def test_fused_is_the_reference_in_float64(device, prediction, variance, clip):
    x_start, t = images(device=device), torch.tensor([0, 1, 0, 20, 39], device=device)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    fused, reference = (diffusion(prediction, variance, backend) for backend in ("fused", "reference"))
    model = noisy(prediction, variance.startswith("learned"))
    seen = []

    def recorded(x, t):
        seen.append(model(x, t))
        return seen[-1]

    found = fused.vlb_terms(recorded, x_start, t, noise=z, clip_denoised=clip)
    expected = reference.vlb_terms(
        lambda *_: seen[0].double(), x_start.double(), t, noise=z.double(), clip_denoised=clip
    )
    assert len(seen) == 1
    assert expected.output.dtype == torch.float64 and found.output.dtype == torch.float32
    torch.testing.assert_close(found.output, expected.output.float(), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(found.pred_xstart, expected.pred_xstart.float(), rtol=1e-4, atol=1e-4)
    if clip:
        low, high = (-1.0, 1.0) if clip is True else clip
        ends = [float(end) for end in found.pred_xstart.aminmax()]  # on the host, where pytest compares
        assert ends == pytest.approx([low, high])


@backends
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_one_timestep_for_all(device, backend, variance):
    """t as an int and as a tensor. With a tensor both kinds of terms are computed."""
    gd, x_start = diffusion(variance=variance, backend=backend), images(device=device)
    model = noisy(learned=variance.startswith("learned"))
    for t in (0, 1, 39):
        one = gd.vlb_terms(model, x_start, t, rng=RNG)
        many = gd.vlb_terms(model, x_start, torch.full((len(x_start),), t, device=device), rng=RNG)
        for found, expected in zip(one, many, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
def test_gradients(variance):
    """The bound's gradients in the model's output are those of the float64 reference, also at t = 0."""
    x_start, t = images(), torch.tensor([0, 1, 5, 20, 39])
    x_start[0, 0, 0, 0], x_start[0, 0, 0, 1] = -1, 1
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    model = noisy(learned=variance.startswith("learned"))
    slopes = []
    for backend, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        gd = diffusion(variance=variance, backend=backend)
        with torch.no_grad():
            output = model(gd.q_sample(x_start, t, z), t).to(dtype)
        output.requires_grad_()
        terms = gd.vlb_terms(lambda *_, y=output: y, x_start.to(dtype), t, noise=z.to(dtype), clip_denoised=False)
        assert not terms.pred_xstart.requires_grad
        terms.output.sum().backward()
        slopes.append(output.grad)
    assert slopes[1].isfinite().all() and (slopes[1] != 0).all()
    size = slopes[1].abs().amax((1, 2, 3), keepdim=True)
    assert ((slopes[0] - slopes[1]).abs() <= 1e-4 * size).all()


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_terminal_level_of_zero_and_single_timesteps(prediction):
    betas = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    gd = GaussianDiffusion(3, betas, prediction=prediction)
    found = gd.bits_per_dim(noisy(prediction), images(), rng=RNG)
    assert all(tensor.isfinite().all() for tensor in found)
    assert (found.prior == 0).all() and (found.mse[:, -1] == 0).all() and (found.x_start_mse[:, -1] > 0).all()
    alone = GaussianDiffusion(1, torch.tensor([0.02]), prediction=prediction)
    found = alone.bits_per_dim(exact_model(alone), images(), rng=RNG)
    kept = alone.alphas_cumprod[0]
    x_t = kept.sqrt() * images().double() + (1 - kept).sqrt() * randn(SHAPE, RNG, stream=STREAM_FORWARD).double()
    x0 = best_prediction(kept, x_t, "x0").clamp(-1, 1)
    log_p = discretized_gaussian_log_likelihood(images().double(), mean=x0, log_scale=math.log(0.02) / 2)
    torch.testing.assert_close(found.vlb[:, 0], (-mean(log_p) / math.log(2)).float(), rtol=1e-4, atol=0)


def test_seeds_and_progress(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gd, x_start = diffusion(), images()
    torch.manual_seed(3)
    first = gd.bits_per_dim(noisy(), x_start)
    torch.manual_seed(3)
    again = gd.bits_per_dim(noisy(), x_start, progress=False)
    assert torch.equal(first.vlb, again.vlb) and capsys.readouterr().err == ""
    assert not torch.equal(first.vlb, gd.bits_per_dim(noisy(), x_start).vlb)
    pytest.importorskip("tqdm")
    gd.bits_per_dim(noisy(), x_start, rng=RNG, progress=True)
    assert f"{TIMESTEPS}/{TIMESTEPS}" in capsys.readouterr().err


def test_batches_and_shapes_do_not_matter(device):
    """And a whole bound has no gradients."""
    gd, x_start, w = diffusion(), images(device=device), torch.ones((), requires_grad=True, device=device)
    model = lambda x, t: w * noisy()(x, t)  # noqa: E731
    whole = gd.bits_per_dim(model, x_start, rng=RNG)
    parts = [gd.bits_per_dim(model, x_start[i : i + 2], rng=Philox(11, 1000 + i)) for i in range(0, len(x_start), 2)]
    for found, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert not expected.requires_grad
    flat = images((6,), device)
    found = [gd.bits_per_dim(exact_model(gd), x, rng=RNG) for x in (flat, flat[:, None])]
    assert all(map(torch.equal, *found))


BYTES = {"x_start": torch.zeros(2, 3, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("method", "change", "kind", "message"),
    [
        ("vlb_terms", {"t": 40}, ValueError, "t is 40, expected 0 <= t < 40"),
        ("vlb_terms", {"t": torch.tensor([0, 0])}, ValueError, r"t has shape \[2\], expected \[5\], one a sample"),
        ("vlb_terms", {"x_start": None}, TypeError, "x_start is a NoneType, expected a tensor"),
        ("vlb_terms", {"noise": torch.zeros(5, 3)}, ValueError, "noise has shape"),
        ("vlb_terms", {"noise": torch.zeros(SHAPE), "rng": RNG}, ValueError, "noise and rng are both given"),
        ("vlb_terms", {"rng": 3}, TypeError, "rng is a int, expected a ddpm_ext.Philox"),
        ("vlb_terms", {"clip_denoised": 2}, TypeError, "clip_denoised is 2, expected a bool"),
        ("bits_per_dim", {"rng": Philox(0, draw=3)}, ValueError, "expected one without a draw or a stream of its own"),
        ("bits_per_dim", {"rng": Philox(0, stream=3)}, ValueError, "expected one without a draw or a stream"),
        ("bits_per_dim", {"rng": 0}, TypeError, "rng is a int, expected a ddpm_ext.Philox"),
        ("bits_per_dim", BYTES, TypeError, "x_start has dtype torch.uint8, expected a float"),
        ("prior_bpd", BYTES, TypeError, "x_start has dtype torch.uint8, expected a float"),
    ],
)
def test_bad_arguments_never_reach_the_model(method, change, kind, message):
    model = Model()
    own = {"vlb_terms": {"model": model, "t": 3}, "bits_per_dim": {"model": model, "rng": RNG}, "prior_bpd": {}}[method]
    with pytest.raises(kind, match=message):
        getattr(diffusion(), method)(**own | {"x_start": images()} | change)
    assert model.calls == 0


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_output_of_another_shape(variance):
    with pytest.raises(ValueError, match=r"model_output has shape .5, 1, 4, 6., expected"):
        diffusion(variance=variance).vlb_terms(lambda x, t: x[:, :1], images(), 3, rng=RNG)
