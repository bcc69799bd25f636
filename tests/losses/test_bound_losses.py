"""train_losses with the variational bound, alone or added to the error, against the papers' formulas in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support.comparison import backends, float64, normals
from support.refusals import Model, refuse
from torch._dynamo.backends.debugging import aot_eager

from ddpm_ext import GaussianDiffusion, Philox, reference
from ddpm_ext.losses.rows import LossRows
from ddpm_ext.losses.train_losses import LossOptions, bound_factor
from ddpm_ext.ops import loss as losses
from ddpm_ext.ops.gaussians import discretized_gaussian_log_likelihood, normal_kl

SHAPE = (6, 3, 5, 7)
TIMESTEPS = torch.tensor([0, 1, 2, 400, 999, 0])
predictions = pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
variances = pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_small", "fixed_large"])
LEARNED = ("learned", "learned_range")


def images(device, seed=0):
    """8-bit images with many pixels in the outermost bins."""
    levels = torch.randint(-60, 316, SHAPE, generator=torch.Generator().manual_seed(seed)).clamp(0, 255)
    return (levels.float() / 127.5 - 1).to(device)


def outputs(variance, device):
    """A model's output, which has a second half if the variance is learned."""
    m, v = normals(2, device)
    if variance not in LEARNED:
        return m
    return torch.cat([m, v * 0.7 if variance == "learned_range" else v - 6], 1)


def log_variance_of(gd, v, t):
    """The logarithm of the variance of p(x_{t-1} | x_t), as in guided-diffusion."""
    small = torch.cat([gd.posterior_variance[1:2], gd.posterior_variance[1:]]).log()[t][:, None, None, None]
    large = gd.betas.log()[t][:, None, None, None]
    if gd.variance == "learned":
        return v
    if gd.variance == "learned_range":
        return (v + 1) / 2 * large + (1 - v) / 2 * small
    return torch.where((t == 0)[:, None, None, None], small, large) if gd.variance == "fixed_large" else small


def bound_of(gd, m, x, z, t):
    """The term of each element in bits, from the means: eq. (5) and (13) of Ho et al. 2020."""
    exact = GaussianDiffusion(1000, prediction=gd.prediction, backend="reference")
    m, v = m.chunk(2, 1) if gd.variance in LEARNED else (m, None)
    x_t = exact.q_sample(x, t, z)
    true_mean, _, true_log_variance = exact.q_posterior_mean_variance(x, x_t, t)
    mean = exact.p_mean_variance(lambda *_: m, x_t, t, False)[0]
    log_variance = log_variance_of(gd, v, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    likelihood = discretized_gaussian_log_likelihood(x, mean=mean, log_scale=log_variance / 2)
    return torch.where((t == 0)[:, None, None, None], -likelihood, kl) / math.log(2)


def error_of(gd, m, x, z, t, loss):
    exact = GaussianDiffusion(1000, prediction=gd.prediction, backend="reference")
    m = m.chunk(2, 1)[0] if gd.variance in LEARNED else m
    a, s = (gd.alphas_cumprod[t] ** 0.5)[:, None, None, None], ((1 - gd.alphas_cumprod[t]) ** 0.5)[:, None, None, None]
    target = {
        "eps": lambda: z,
        "x0": lambda: x,
        "v": lambda: a * z - s * x,
        "x_prev": lambda: exact.q_posterior_mean_variance(x, a * x + s * z, t)[0],
    }[gd.prediction]()
    if loss == "huber":
        return F.huber_loss(m, target, reduction="none", delta=0.3)
    return (m - target) ** 2 if loss == "mse" else (m - target).abs()


def check(got, leaf, truth, wide):
    """Compares values and gradients. `truth` has shape (batch,)."""
    upstream = torch.linspace(1, 2, len(truth)).double()
    truth.backward(upstream)
    got.backward(upstream.to(got))
    torch.testing.assert_close(float64(got.detach()), truth.detach(), rtol=2e-6, atol=0)
    for ours, theirs in zip(*(g.split(SHAPE[1], 1) for g in (float64(leaf.grad), wide.grad)), strict=True):
        # near t = 999 the derivative of the variance is smaller than the rounding error of 1 - 1 in float32
        scale = theirs.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
        error = (ours - theirs).abs() / scale
        assert error.max() < 3e-6, error.max()


@backends
@predictions
@variances
@pytest.mark.parametrize("loss", ["vlb", "rescaled_vlb"])
def test_bound_alone(backend, prediction, variance, loss, device):
    gd = GaussianDiffusion(1000, prediction=prediction, variance=variance, backend=backend)
    x, m, (z,) = images(device), outputs(variance, device), normals(1, device, seed=5)
    leaf, wide = m.clone().requires_grad_(), float64(m).requires_grad_()
    options = {"loss": loss, "reduction": "none"}
    got = gd.train_losses(lambda *_: leaf, x, TIMESTEPS.to(device), z, **options)
    truth = bound_of(gd, wide, float64(x), float64(z), TIMESTEPS).flatten(1).mean(1)
    check(got, leaf, truth * (1000 if loss == "rescaled_vlb" else 1), wide)


@backends
@predictions
@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_hybrid(backend, prediction, variance, loss, device):
    """L_simple + vlb_weight L_vlb, whose mean is detached: eq. (16) of Nichol & Dhariwal 2021."""
    gd = GaussianDiffusion(1000, prediction=prediction, variance=variance, backend=backend)
    x, m, (z,) = images(device), outputs(variance, device), normals(1, device, seed=5)
    own = torch.linspace(0.5, 2, 1000)
    for weighting, factor in (("simple", {}), (own, {"vlb_weight": 0.01}), (own, {"vlb_weight": 0})):
        leaf, wide = m.clone().requires_grad_(), float64(m).requires_grad_()
        options = {"loss": loss, "delta": 0.3, "weighting": weighting, "reduction": "none"} | factor
        got = gd.train_losses(lambda *_, leaf=leaf: leaf, x, TIMESTEPS.to(device), z, **options)
        x64, z64 = float64(x), float64(z)
        weight = 1.0 if weighting == "simple" else own.double()[TIMESTEPS]
        error = error_of(gd, wide, x64, z64, TIMESTEPS, loss).flatten(1).mean(1) * weight
        detached = torch.cat([wide[:, :3].detach(), wide[:, 3:]], 1)
        bound = bound_of(gd, detached, x64, z64, TIMESTEPS).flatten(1).mean(1) * 1000
        if factor.get("vlb_weight") == 0:
            got.sum().backward()
            assert (leaf.grad[:, 3:] == 0).all() and (leaf.grad[:, :3] != 0).any()
            continue
        check(got, leaf, error + factor.get("vlb_weight", 0.001) * bound, wide)


@backends
@variances
def test_reductions_and_draws(backend, variance, device):
    """Mean and sum of the samples' losses and gradients, with the noise of the contract, also with one int for t."""
    gd = GaussianDiffusion(1000, variance=variance, backend=backend)
    x, m, t = images(device), outputs(variance, device), TIMESTEPS.to(device)
    rng = Philox(3, 40)
    seen = []
    for how in losses.REDUCTIONS:
        leaf = m.clone().requires_grad_()
        loss = gd.train_losses(lambda *_, leaf=leaf: leaf, x, t, rng=rng, loss="vlb", reduction=how)
        loss.sum().backward()
        seen.append((loss.detach(), leaf.grad))
    (mean, mean_slope), (each, slope), (total, total_slope) = seen
    torch.testing.assert_close(mean, each.mean())
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(slope, total_slope, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean_slope, slope / 6, rtol=1e-5, atol=1e-9)
    z = gd.process.ops.forward_process(torch.zeros_like(x), torch.tensor([[0.0, 1.0]] * 1000).to(device), t, rng=rng)
    given = gd.train_losses(lambda *_: m, x, t, z, loss="vlb", reduction="none")
    torch.testing.assert_close(given, each, rtol=2e-6, atol=0)
    one = gd.train_losses(lambda *_: m, x, 400, z, loss="vlb", reduction="none")
    assert torch.equal(one, gd.train_losses(lambda *_: m, x, 400 + 0 * t, z, loss="vlb", reduction="none"))


@predictions
@variances
def test_all_timesteps_are_the_likelihoods_bound(prediction, variance, device):
    """Term by term, with the same noise. bits_per_dim computes both means, train_losses their difference."""
    gd = GaussianDiffusion(20, "cosine", prediction=prediction, variance=variance)
    x, m = images(device), outputs(variance, device)
    rng = Philox(9, 100)
    expected = gd.bits_per_dim(lambda *_: m, x, rng=rng, clip_denoised=False).vlb
    ask = functools.partial(gd.train_losses, lambda *_: m, x, rng=rng, reduction="none")
    found = torch.stack([ask(t, loss="vlb") for t in range(20)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    rescaled = torch.stack([ask(t, loss="rescaled_vlb") for t in range(20)], 1).mean(1)
    torch.testing.assert_close(rescaled, found.sum(1), rtol=1e-5, atol=0)


@predictions
@variances
def test_a_samples_loss_is_the_same_in_every_batch(prediction, variance, device):
    gd = GaussianDiffusion(prediction=prediction, variance=variance)
    x, m, t = images(device), outputs(variance, device), TIMESTEPS.to(device)

    def ask(index):
        leaf = m[index].clone().requires_grad_()
        options = {"loss": "rescaled_vlb", "reduction": "none", "rng": Philox(5, 100 + index.start)}
        loss = gd.train_losses(lambda *_: leaf, x[index], t[index], **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    whole = ask(slice(0, 6))
    parts = [ask(slice(0, 2)), ask(slice(2, 3)), ask(slice(3, 6))]
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(found), expected)


@variances
def test_layouts(variance, device):
    """The two halves or the samples may lie apart in memory."""
    gd = GaussianDiffusion(variance=variance)
    x, m, t = images(device), outputs(variance, device), TIMESTEPS.to(device)

    def ask(m, x):
        leaf = m.detach().requires_grad_()
        loss = gd.train_losses(lambda *_: leaf, x, t, rng=Philox(1), reduction="none", loss="vlb")
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    expected = ask(m, x)
    last = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    for other in (ask(last(m), x), ask(last(m), last(x)), ask(m, x.mT.contiguous().mT), ask(m.mT.contiguous().mT, x)):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("loss", ["mse", "vlb"])
def test_lower_precision(dtype, variance, loss, device):
    """Outputs of 16 bits are used as they are. Their gradient has 16 bits, and is divided by the batch in float32."""
    gd = GaussianDiffusion(variance=variance)
    x, t = images(device), TIMESTEPS.to(device)
    leaf = outputs(variance, device).to(dtype).requires_grad_()
    wide = leaf.detach().float().requires_grad_()
    for scale in (1.0, 4096.0):
        found = []
        for m in (leaf, wide):
            m.grad = None
            value = gd.train_losses(lambda *_, m=m: m, x, t, rng=Philox(1), loss=loss)
            (value * scale).backward()
            found.append(value.detach())
        assert torch.equal(*found)
        assert leaf.grad.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(leaf.grad.float(), wide.grad, rtol=2 * torch.finfo(dtype).eps, atol=tiny)


@backends
@pytest.mark.parametrize("far", [1e2, 1e6, 1e12])
def test_far_outputs(backend, far, device):
    """Losses and gradients of a very bad model are finite, also at the decoder, where float32 would compute ln 0."""
    gd = GaussianDiffusion(variance="learned", backend=backend)
    x, t = images(device), torch.tensor([0, 0, 1, 0, 0, 1], device=device)
    m = outputs("learned", device).requires_grad_()
    loss = gd.train_losses(lambda *_: torch.cat([m[:, :3] * far, m[:, 3:]], 1), x, t, rng=Philox(0), loss="vlb")
    (slope,) = torch.autograd.grad(loss, m)
    assert loss.isfinite() and slope.isfinite().all()
    inner = x.abs() < 0.999  # a mean far beyond an outermost bin predicts that bin
    assert (slope[:, :3][inner] != 0).all()


@pytest.mark.parametrize("log_variance", [-80.0, -30.0, -4.0, 4.0, 30.0])
def test_any_log_variance_at_the_decoder(log_variance, device):
    """From bins of many standard deviations to standard deviations of many bins."""
    gd = GaussianDiffusion(variance="learned")
    x, (z, m) = images(device), normals(2, device)
    v = torch.full_like(m, log_variance)
    leaf = torch.cat([z + 0.3 * m, v], 1).requires_grad_()
    wide = float64(leaf.detach()).requires_grad_()
    got = gd.train_losses(lambda *_: leaf, x, 0, z, loss="vlb", reduction="none")
    held = torch.cat([wide[:, :3], wide[:, 3:].clamp(-60, 60)], 1)
    truth = bound_of(gd, held, float64(x), float64(z), torch.zeros(6, dtype=torch.int64)).flatten(1).mean(1)
    torch.testing.assert_close(float64(got.detach()), truth.detach(), rtol=3e-4 if log_variance < -20 else 3e-6, atol=0)


def test_compiles_whole(device):
    torch.compiler.reset()
    x, t = images(device), TIMESTEPS.to(device)
    for variance, options in (
        ("learned_range", {}),
        ("learned", {"loss": "vlb"}),
        ("fixed_small", {"loss": "rescaled_vlb"}),
        ("learned_range", {"weighting": "min_snr", "vlb_weight": 0.01}),
    ):
        gd, m = GaussianDiffusion(variance=variance), outputs(variance, device)

        def step(m, x, gd=gd, options=options):
            return gd.train_losses(lambda x_t, t: m + 0 * x_t.mean(), x, t, rng=Philox(3), **options)

        found = []
        for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step):
            leaf = m.clone().requires_grad_()
            loss = function(leaf, x)
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.compiler.reset()


def test_compiles_once_for_every_weight_of_the_bound(device):
    """A weight that changes during training, and other batch sizes, use the same graph."""
    torch.compiler.reset()
    gd, compiled = GaussianDiffusion(variance="learned_range"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    def step(m, x, t, vlb_weight):
        return gd.train_losses(lambda *_: m, x, t, rng=Philox(3), vlb_weight=vlb_weight)

    x, m, t = images(device), outputs("learned_range", device), TIMESTEPS.to(device)
    function = torch.compile(step, backend=backend, fullgraph=True)
    for i in range(10):
        size, vlb_weight = 2 + i % 5, 0.001 + 0.0003 * i
        given = m[:size], x[:size], t[:size], vlb_weight
        assert torch.equal(function(*given), step(*given))
    assert len(compiled) <= 3
    torch.compiler.reset()


def bound_rows(gd, device, dtype, loss, vlb_weight):
    """The rows that train_losses takes."""
    loss_rows = LossRows(gd.process)
    bound = bound_factor(gd, gd.variance_entry, loss_rows, LossOptions(loss=loss, vlb_weight=vlb_weight))
    return loss_rows.get("simple", device, dtype, loss == "mse", bound)


def test_gradcheck_of_the_reference():
    gd = GaussianDiffusion(50, variance="learned_range", backend="reference")
    x = images("cpu").double()[:4, :, :2, :2]
    m = outputs("learned_range", "cpu").double()[:4, :, :2, :2].requires_grad_()
    t, z = torch.tensor([0, 1, 30, 49]), torch.randn_like(x)
    for loss in ("vlb", "mse"):
        rows = bound_rows(gd, x.device, x.dtype, loss, 0.1)
        assert torch.autograd.gradcheck(
            lambda m, rows=rows: reference.diffusion_loss(m, x, rows, t, noise=z, variational=True), m
        )


def test_opcheck(device):
    gd = GaussianDiffusion(variance="learned_range")
    x, m, t = images(device), outputs("learned_range", device).requires_grad_(), TIMESTEPS.to(device)
    rows = bound_rows(gd, device, torch.float32, "mse", 0.001)
    for detach_mean in (True, False):
        torch.library.opcheck(
            torch.ops.ddpm_ext.diffusion_loss,
            (m, x, rows, t, 0, 0, 1.0, None, None, 7, None, 0, 2, -1),
            {"reduction": 1, "want_slope": True, "variational": True, "detach_mean": detach_mean},
        )


@backends
def test_refusals(backend, device):
    bad = functools.partial(refuse, "train_losses", backend, device)
    bad(ValueError, ["loss is 'kl'", "'vlb' or 'rescaled_vlb'"], loss="kl")
    bad(ValueError, ["weighting is given beside loss 'vlb'", "'simple'"], loss="vlb", weighting="snr")
    for weighting in (torch.ones(50), torch.ones(50).numpy(), None):
        bad(ValueError, ["weighting is given beside loss 'vlb'"], loss="vlb", weighting=weighting)
    for value, kind in ((-1, ValueError), (float("nan"), ValueError), (math.inf, ValueError), ("1", TypeError)):
        bad(kind, [f"vlb_weight is {value!r}"], vlb_weight=value)
    x, t = images(device), TIMESTEPS.to(device)
    make = functools.partial(GaussianDiffusion, backend=backend)
    with pytest.raises(ValueError, match="variance is 'learned_variance', expected 'learned' or 'learned_range'"):
        make(variance="learned_variance").train_losses(Model(), x, t)
    zero = torch.cat([torch.full((49,), 0.1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="alphas_cumprod ends at 0"):
        make(beta_schedule=zero, timesteps=50, variance="learned_range").train_losses(Model(), x, t)
    for shape in (SHAPE, (6, 5, 5, 7), (6, 6, 5, 8)):
        with pytest.raises(ValueError, match=r"model_output has shape .*, expected \(6, 6, 5, 7\), twice"):
            make(variance="learned").train_losses(lambda *_, shape=shape: torch.zeros(shape, device=device), x, t)
    with pytest.raises(ValueError, match="x_start is missing, expected one beside variational"):
        gd = make(variance="learned")
        rows = bound_rows(gd, device, torch.float32, "vlb", 0.0)
        gd.process.ops.diffusion_loss(outputs("learned", device), None, rows, t, rng=Philox(0), variational=True)
