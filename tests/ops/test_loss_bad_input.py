"""ops.diffusion_loss and its twin refuse bad arguments with a sentence that names them. Empty batches have a loss."""

from __future__ import annotations

import math

import pytest
import torch
from support.refusals import raises

from ddpm_ext import Philox, ops, reference
from ddpm_ext.ops.loss_kinds import REDUCTIONS

backends = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])


@pytest.fixture(scope="session")
def table(device):
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(3)).to(device)


@backends
@pytest.mark.parametrize("shape", [(0, 3, 4), (0,), (2, 0), (2, 3, 0)], ids=str)
def test_nothing_at_all(backend, shape, table, device):
    """As in torch: the mean of an empty batch is NaN, its sum 0. The mean of a sample without elements is NaN, too."""
    m = torch.zeros(shape, device=device, requires_grad=True)
    for noise in ({"noise": torch.zeros(shape, device=device)}, {"rng": Philox(0)}):
        mean, each, total = (backend.diffusion_loss(m, m.detach(), table, 0, reduction=r, **noise) for r in REDUCTIONS)
        assert mean.shape == () and mean.isnan()
        assert each.shape == shape[:1] and each.isnan().all()
        assert total.shape == () and (total == 0 if shape[0] == 0 else total.isnan())
        for loss in (mean, each.sum(), total):
            (slope,) = torch.autograd.grad(loss, m)
            assert slope.shape == shape


# What replaces a good argument, by a tensor (3, 4) of the device. A GPU's values are not read back.
BAD = [
    (lambda m: {"model_output": None}, TypeError, ["model_output is a NoneType", "tensor"]),
    (lambda m: {"x_start": [1.0]}, TypeError, ["x_start is a list", "tensor"]),
    (lambda m: {"x_start": m.T}, ValueError, ["has shape"]),
    (lambda m: {"x_start": m.long()}, TypeError, ["x_start has dtype"]),
    (lambda m: {"x_start": m.half(), "noise": m.half()}, TypeError, ["model_output has dtype"]),
    (lambda m: dict.fromkeys(("model_output", "x_start", "noise"), m[0, 0]), ValueError, ["0-dim"]),
    (lambda m: {"loss": "l2"}, ValueError, ["loss is 'l2'", "'mse' or 'l1' or 'huber'"]),
    (lambda m: {"loss": None}, ValueError, ["loss is None"]),
    (lambda m: {"reduction": "batchmean"}, ValueError, ["reduction is 'batchmean'", "'mean' or 'none' or 'sum'"]),
    (lambda m: {"delta": 0}, ValueError, ["delta is 0", "delta > 0"]),
    (lambda m: {"delta": math.nan}, ValueError, ["delta is nan", "delta > 0"]),
    (lambda m: {"delta": "1"}, TypeError, ["delta is '1'", "a number"]),
    (lambda m: {"t": 7}, ValueError, ["t is 7", "0 <= t < 7"]),
    (lambda m: {"t": 1.5}, TypeError, ["t is a float"]),
    (lambda m: {"t": torch.tensor([0, 1], device=m.device)}, ValueError, ["t has shape .*, expected .*one a sample"]),
    (lambda m: {"t": torch.tensor([0, 1, 7])}, ValueError, [r"t\[2\] is 7|t is on cpu"]),
    (lambda m: {"noise": None}, ValueError, ["noise and rng are both None"]),
    (lambda m: {"noise": [0.0]}, TypeError, ["noise is a list", "tensor"]),
    (lambda m: {"noise": m[:, :3]}, ValueError, ["noise has shape"]),
    (lambda m: {"noise": m.half()}, TypeError, ["noise has dtype"]),
    (lambda m: {"rng": Philox(0)}, ValueError, ["noise and rng are both given"]),
    (lambda m: {"rng": 5}, TypeError, ["rng is"]),
]


@backends
@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_arguments(backend, change, error, words, table, normal):
    m = normal(3, 4)
    arguments = {"model_output": m, "x_start": m, "table": table, "t": 0, "noise": m} | change(m)
    raises(error, words, lambda: backend.diffusion_loss(**arguments))


def test_gradients_it_does_not_have_are_refused(table, normal):
    m, leaf = normal(3, 4), normal(3, 4, seed=1, grad=True)
    for name, arguments in (("x_start", (leaf, m)), ("noise", (m, leaf)), ("noise", (None, leaf))):
        with pytest.raises(ValueError, match=f"{name} requires a gradient, expected none"):
            ops.diffusion_loss(m, arguments[0], table, 0, noise=arguments[1])
        with torch.no_grad():
            assert ops.diffusion_loss(m, arguments[0], table, 0, noise=arguments[1]).isfinite()
