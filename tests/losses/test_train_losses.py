"""GaussianDiffusion.train_losses against the papers' formulas in float64, and in common ways to train.

These are autocast, accumulated gradients, checkpointed models and compiled steps.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from support.comparison import backends, float64, normals, target_of, timesteps
from support.refusals import Model, refuse
from torch._subclasses import FakeTensorMode

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.tables.weightings import WEIGHTINGS, weights

SHAPE = (6, 3, 5, 7)
LOSSES = {
    "mse": lambda m, y: (m - y) ** 2,
    "l1": lambda m, y: (m - y).abs(),
    "huber": lambda m, y: F.huber_loss(m, y, reduction="none", delta=0.3),
}
REDUCE = {"mean": torch.mean, "sum": torch.sum, "none": lambda each: each}
predictions = pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])


@backends
@predictions
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCE)
def test_values_and_gradients(backend, prediction, loss, reduction, device):
    """For each kind of noise, weighting and t. The gradient is that in the model's output."""
    gd = GaussianDiffusion(1000, prediction=prediction, backend=backend)
    x, m, given = normals(3, device)
    own = torch.linspace(0.5, 2, 1000)
    for weighting in ("simple", own) if prediction == "x_prev" else ("simple", *WEIGHTINGS, own):
        for t in (timesteps(device), 700):
            each = t.cpu() if isinstance(t, torch.Tensor) else torch.full((6,), t)
            for options in ({"noise": given}, {"rng": Philox(3, 5)}):
                z = float64(given)
                if "rng" in options:
                    draws = [(Philox(3, 5 + i), int(draw)) for i, draw in enumerate(each)]
                    one = functools.partial(ddpm_ext.randn, (1, *SHAPE[1:]), stream=2)
                    z = torch.cat([one(rng, draw=draw) for rng, draw in draws]).double()
                leaf, wide = m.clone().requires_grad_(), float64(m).requires_grad_()
                options |= {"loss": loss, "delta": 0.3, "weighting": weighting, "reduction": reduction}
                got = gd.train_losses(lambda *_, leaf=leaf: leaf, x, t, **options)

                weight = weights(gd.alphas_cumprod, prediction, weighting)[each]
                truth = LOSSES[loss](wide, target_of(prediction, float64(x), z, each)).flatten(1).mean(1) * weight
                truth = REDUCE[reduction](truth)
                upstream = torch.linspace(1, 2, 6).double() if reduction == "none" else torch.tensor(1.0).double()
                truth.backward(upstream)
                got.backward(upstream.to(device, torch.float32))
                assert got.dtype == torch.float32 and got.device == device
                torch.testing.assert_close(float64(got.detach()), truth.detach(), rtol=1e-6, atol=1e-12)
                scale = wide.grad.abs().amax((1, 2, 3), keepdim=True)
                error = (float64(leaf.grad) - wide.grad).abs() / scale
                assert error.max() < 2e-6, error.max()


# -------------------------------------------------------------------------------------------- as one trains


def test_gradients_reach_what_made_x_t(device):
    """x_start requires a gradient, as that of an encoder. The fused loss has it for eps only, the reference always."""
    (x, z), t = normals(2, device), timesteps(device)
    for options in ({"noise": z}, {"rng": Philox(11, 2**40), "input_perturbation": 0.1, "offset_noise": 0.1}):
        found = []
        for backend in ("fused", "reference"):
            leaf = x.clone().requires_grad_()
            GaussianDiffusion(backend=backend).train_losses(lambda x_t, t: x_t**2, leaf, t, **options).backward()
            assert torch.equal(leaf, x)
            found.append(leaf.grad)
        torch.testing.assert_close(*found, rtol=1e-5 if "noise" in options else 1e-4, atol=1e-9)
    for prediction in ("x0", "v", "x_prev"):
        leaf, model = x.clone().requires_grad_(), Model()
        with pytest.raises(ValueError, match="x_start requires a gradient, expected none"):
            GaussianDiffusion(prediction=prediction).train_losses(model, leaf, t, z)
        assert model.calls == 0
        GaussianDiffusion(prediction=prediction, backend="reference").train_losses(Model(), leaf, t, z).backward()
        assert leaf.grad.abs().max() > 0
    with pytest.raises(ValueError, match="noise requires a gradient, expected none"):
        GaussianDiffusion().train_losses(Model(), x, t, z.clone().requires_grad_())


@pytest.mark.parametrize("options", [{}, {"loss": "vlb"}, {"input_perturbation": 0.1}], ids=str)
def test_nothing_is_kept_without_data(options, device):
    """Tables that were first made with fake tensors or in a function transform are made again."""
    (x, m), t = normals(2, device), timesteps(device)
    expected = GaussianDiffusion().train_losses(lambda *_: m, x, t, rng=Philox(0), **options)
    gd = GaussianDiffusion()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(SHAPE, device=device, requires_grad=True)
        steps = torch.zeros(6, dtype=torch.int64, device=device)
        gd.train_losses(lambda *_: fake, fake.detach(), steps, **options).backward()
        assert fake.grad.shape == SHAPE
    assert torch.equal(gd.train_losses(lambda *_: m, x, t, rng=Philox(0), **options), expected)
    gd = GaussianDiffusion()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda m: gd.train_losses(lambda *_: m, x, t, **options))(m)
    assert torch.equal(gd.train_losses(lambda *_: m, x, t, rng=Philox(0), **options), expected)


@backends
def test_bad_options_before_the_model_is_called(backend, device):
    before = torch.get_rng_state()
    for error, words, change in (
        (ValueError, ["loss is 'l2'", "'mse' or 'l1' or 'huber'"], {"loss": "l2"}),
        (ValueError, ["reduction is 'batchmean'", "'mean' or 'none' or 'sum'"], {"reduction": "batchmean"}),
        (ValueError, ["delta is 0", "delta > 0"], {"delta": 0}),
        (ValueError, ["weighting is 'max'", "'simple' or 'snr' or 'min_snr'"], {"weighting": "max"}),
        (TypeError, ["weighting is a int", "a name or a tensor"], {"weighting": 5}),
        (ValueError, [r"weighting has shape \(49,\)", r"expected \(50,\)"], {"weighting": torch.ones(49)}),
        (ValueError, ["weighting holds numbers that are not finite"], {"weighting": torch.full((50,), torch.inf)}),
    ):
        refuse("train_losses", backend, device, error, words, **change)
    assert torch.equal(torch.get_rng_state(), before)  # no seed was drawn before the refusal


def test_weights_that_are_written_to_are_read_by_a_compiled_step(fresh_compiler, device):
    """The graph does not contain the old ones."""
    gd, (x, m), t = GaussianDiffusion(), normals(2, device), timesteps(device)
    step = lambda weighting: gd.train_losses(lambda *_: m, x, t, rng=Philox(3), weighting=weighting)  # noqa: E731
    compiled, own = torch.compile(step, backend="aot_eager", fullgraph=True), torch.linspace(0.5, 2, gd.timesteps)
    before = compiled(own)
    assert torch.equal(before, step(own))
    own.mul_(2)
    assert torch.equal(compiled(own), 2 * before)
