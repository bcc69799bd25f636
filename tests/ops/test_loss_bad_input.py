"""ops.diffusion_loss and its twin refuse bad arguments with a sentence that names them. Empty batches have a loss."""

from __future__ import annotations

import math

import pytest
import torch
from support.refusals import raises

from ddpm_ext import Philox, ops, reference
from ddpm_ext.ops.loss_kinds import REDUCTIONS

NAN = math.nan

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


BAD = {
    "model_output": [(None, TypeError, ["model_output is a NoneType", "tensor"])],
    "x_start": [([1.0], TypeError, ["x_start is a list", "tensor"])],
    "loss": [("l2", ValueError, ["loss is 'l2'", "'mse' or 'l1' or 'huber'"]), (None, ValueError, ["loss is None"])],
    "reduction": [("batchmean", ValueError, ["reduction is 'batchmean'", "'mean' or 'none' or 'sum'"])],
    "delta": [
        (0, ValueError, ["delta is 0", "delta > 0"]),
        (-1.0, ValueError, ["delta is -1.0", "delta > 0"]),
        (NAN, ValueError, ["delta is nan", "delta > 0"]),
        ("1", TypeError, ["delta is '1'", "a number"]),
        (True, TypeError, ["delta is True", "a number"]),
        (None, TypeError, ["delta is None", "a number"]),
    ],
    "t": [(7, ValueError, ["t is 7", "0 <= t < 7"]), (-1, ValueError, ["t is -1"]), (1.5, TypeError, ["t is a float"])],
    "noise": [(None, ValueError, ["noise and rng are both None"]), ([0.0], TypeError, ["noise is a list", "tensor"])],
    "rng": [(Philox(0), ValueError, ["noise and rng are both given"]), (5, TypeError, ["rng is"])],
}


@backends
@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [(name, *case) for name, cases in BAD.items() for case in cases],
    ids=lambda value: repr(value) if isinstance(value, str | int | float) else "",
)
def test_bad_arguments(backend, name, value, error, words, table, normal):
    m = normal(3, 4)
    arguments = {"model_output": m, "x_start": m, "table": table, "t": 0, "noise": m, name: value}
    raises(error, words, lambda: backend.diffusion_loss(**arguments))


@backends
def test_tensors_that_do_not_fit(backend, table, normal, device):
    m = normal(3, 4)
    for change, error, words in [
        ({"x_start": normal(4, 3)}, ValueError, "has shape"),
        ({"noise": normal(3, 5)}, ValueError, "noise has shape"),
        ({"noise": m.half()}, TypeError, "noise has dtype"),
        ({"x_start": m.half(), "noise": m.half()}, TypeError, "model_output has dtype"),
        ({"x_start": m.long()}, TypeError, "x_start has dtype"),
        ({"t": torch.tensor([0, 1], device=device)}, ValueError, r"t has shape .*, expected .*one a sample"),
        ({"t": torch.tensor([0, 1, 2], device=device).int()}, TypeError, "t has dtype"),
        ({"t": torch.tensor([0, 1, 7])}, ValueError, r"t\[2\] is 7"),
        ({"model_output": torch.zeros(()), "x_start": torch.zeros(()), "noise": torch.zeros(())}, ValueError, "0-dim"),
    ]:
        if "t" in change and change["t"].device != device:
            continue  # a GPU's values are not read back
        arguments = {"model_output": m, "x_start": m, "table": table, "t": 0, "noise": m, **change}
        raises(error, [words], lambda: backend.diffusion_loss(**arguments))  # noqa: B023


def test_gradients_it_does_not_have_are_refused(table, normal):
    m, leaf = normal(3, 4), normal(3, 4, seed=1, grad=True)
    for name, arguments in (("x_start", (leaf, m)), ("noise", (m, leaf)), ("noise", (None, leaf))):
        with pytest.raises(ValueError, match=f"{name} requires a gradient, expected none"):
            ops.diffusion_loss(m, arguments[0], table, 0, noise=arguments[1])
        with torch.no_grad():
            assert ops.diffusion_loss(m, arguments[0], table, 0, noise=arguments[1]).isfinite()
