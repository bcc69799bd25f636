"""train_losses with the variational bound, alone or added to the error, against the papers' formulas in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support.comparison import backends, float64, log_variance_of, normals, target_of
from support.refusals import Model, raises, refuse
from torch._dynamo.backends.debugging import aot_eager

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.base.torch_version import TORCH
from ddpm_ext.losses.rows import LossRows
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
    m, target = m.chunk(2, 1)[0] if gd.variance in LEARNED else m, target_of(gd.prediction, x, z, t)
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


@predictions
@variances
def test_same_bits(prediction, variance, device):
    """In every batch and layout: the two halves or the samples may lie apart in memory; and with one int for t."""
    gd = GaussianDiffusion(prediction=prediction, variance=variance)
    x, m, t = images(device), outputs(variance, device), TIMESTEPS.to(device)

    def ask(m, x, t=t, first=0):
        leaf = m.detach().requires_grad_()
        options = {"loss": "rescaled_vlb", "reduction": "none", "rng": Philox(5, 100 + first)}
        loss = gd.train_losses(lambda *_: leaf, x, t, **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    expected = ask(m, x)
    parts = [ask(m[i:j], x[i:j], t[i:j], i) for i, j in ((0, 2), (2, 3), (3, 6))]
    last = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    others = [ask(last(m), x), ask(last(m), last(x)), ask(m, x.mT.contiguous().mT), ask(m.mT.contiguous().mT, x)]
    for found in (tuple(map(torch.cat, zip(*parts, strict=True))), *others):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ask(m, x, 400), ask(m, x, 400 + 0 * t), strict=True))


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


@pytest.mark.skipif(TORCH < (2, 14), reason="torch 2.7 and 2.11 make a graph for each float, 2.14 does not")
def test_compiles_once_for_every_weight_of_the_bound(fresh_compiler, device):
    """A weight that changes during training, and other batch sizes, use the same graph."""
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


@pytest.fixture
def rows(device):
    loss_rows = LossRows(GaussianDiffusion(variance="learned_range"))
    return loss_rows.get("simple", device, torch.float32, True, 1.4)


def test_opcheck(rows, device):
    x, m, t = images(device), outputs("learned_range", device).requires_grad_(), TIMESTEPS.to(device)
    for detach_mean in (True, False):
        torch.library.opcheck(
            torch.ops.ddpm_ext.diffusion_loss,
            (m, x, rows, t, 0, 0, 1.0, None, None, 7, None, 0, 2, -1),
            {"reduction": 1, "want_slope": True, "variational": True, "detach_mean": detach_mean},
        )


@backends
def test_refusals(backend, rows, device):
    bad = functools.partial(refuse, "train_losses", backend, device)
    bad(ValueError, ["loss is 'kl'", "'vlb' or 'rescaled_vlb'"], loss="kl")
    for weighting in ("snr", torch.ones(50), torch.ones(50).numpy(), None):
        bad(ValueError, ["weighting is given with loss 'vlb'", "'simple'"], loss="vlb", weighting=weighting)
    for value, kind in ((-1, ValueError), (float("nan"), ValueError), (math.inf, ValueError), ("1", TypeError)):
        bad(kind, [f"vlb_weight is {value!r}"], vlb_weight=value)
    x, t = images(device), TIMESTEPS.to(device)
    zero = torch.cat([torch.full((49,), 0.1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    for options, output, message in (
        ({"variance": "learned_variance"}, None, "variance is 'learned_variance', expected 'learned' or"),
        ({"beta_schedule": zero, "timesteps": 50, "variance": "learned_range"}, None, "alphas_cumprod ends at 0"),
        ({"variance": "learned"}, SHAPE, r"model_output has shape .*, expected \(6, 6, 5, 7\), twice"),
        ({"variance": "learned"}, (6, 6, 5, 8), r"model_output has shape .*, expected \(6, 6, 5, 7\), twice"),
    ):
        model = Model(None if output is None else torch.zeros(output, device=device))
        gd = GaussianDiffusion(backend=backend, **options)
        raises(ValueError, [message], lambda gd=gd, model=model: gd.train_losses(model, x, t))
        assert model.calls == (output is not None)
    with pytest.raises(ValueError, match="x_start is missing, expected a tensor with variational"):
        gd.ops.diffusion_loss(outputs("learned", device), None, rows, t, rng=Philox(0), variational=True)


def test_losses_of_one_object_in_any_order():
    """With the error, without it, and with other factors of the bound: each loss has rows of its own."""
    z, m, x = torch.zeros(SHAPE), outputs("learned_range", "cpu"), images("cpu")

    def loss_of(gd, options):
        return gd.train_losses(lambda *_: m, x, TIMESTEPS, noise=z + 0.5, **options)

    gd = GaussianDiffusion(1000, variance="learned_range")
    for options in ({}, {"loss": "vlb"}, {"vlb_weight": 0.5}, {"loss": "rescaled_vlb"}, {"loss": "vlb"}, {}):
        assert torch.equal(loss_of(gd, options), loss_of(GaussianDiffusion(1000, variance="learned_range"), options))
