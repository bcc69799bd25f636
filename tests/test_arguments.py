"""Bad arguments of the operators: a ValueError or a TypeError that names the argument, before anything is written."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_ext import Philox, ops, reference

X, TABLE, AFFINE, T = torch.zeros(4, 6), torch.zeros(5, 8), torch.zeros(5, 2), torch.tensor([0, 1, 2, 4])
IDS = torch.arange(4)


TENSORS = {
    "reverse_step": ("x_t", "model_output"),
    "forward_process": ("x_start",),
    "predict_start": ("x_t", "noise"),
    "posterior_mean": ("x_start", "x_t"),
}


def call(backend, name, arguments):
    given = {"x": X, "y": X, "t": T, "table": TABLE if name == "reverse_step" else AFFINE} | arguments
    tensors = [given.pop("x"), given.pop("y")][: len(TENSORS[name])]
    return getattr(backend, name)(*tensors, given.pop("table"), given.pop("t"), **given)


def refused(backend, name, arguments, error, message):
    with pytest.raises(error, match=message.format(x=TENSORS[name][0], y=TENSORS[name][-1])):
        call(backend, name, arguments)


ALL = ["reverse_step", "forward_process", "predict_start", "posterior_mean"]
TWO = ["reverse_step", "predict_start", "posterior_mean"]
NOISY = ["reverse_step", "forward_process"]

# of both backends: operators, arguments, error, message
COMMON = [
    (ALL, {"x": X.long(), "y": X.long()}, TypeError, "{x} has dtype"),
    (ALL, {"x": X.to(torch.complex64), "y": X.to(torch.complex64)}, TypeError, "{x} has dtype"),
    (ALL, {"x": X.bool()}, TypeError, "{x} has dtype"),
    (ALL, {"x": X[0, 0], "y": X[0, 0], "t": 0}, ValueError, "{x} is 0-dimensional"),
    (TWO, {"y": X[:, :5]}, ValueError, "{y} has shape .*4, 5.* expected .*4, 6"),
    (TWO, {"y": X[:1]}, ValueError, "{y} has shape"),
    (TWO, {"y": X[:, :1]}, ValueError, "{y} has shape"),
    (TWO, {"y": X[..., None]}, ValueError, "{y} has shape"),
    (TWO, {"y": X.long()}, TypeError, "{y} has dtype"),
    (ALL, {"t": T.int()}, TypeError, "t has dtype"),
    (ALL, {"t": T.float()}, TypeError, "t has dtype"),
    (ALL, {"t": T[:3]}, ValueError, "t has shape .*3.* expected .*4"),
    (ALL, {"t": T[:1]}, ValueError, "t has shape"),
    (ALL, {"t": T[:, None]}, ValueError, "t has shape"),
    (ALL, {"t": T[0]}, ValueError, "t has shape"),
    (ALL, {"t": torch.tensor([0, 1, 5, 2])}, ValueError, "t.* is .*5.* expected 0 <= t <"),
    (ALL, {"t": torch.tensor([0, -1, 3, 2])}, ValueError, "t.* is .*-1.* expected 0 <= t <"),
    (ALL, {"t": 5}, ValueError, "t is 5, expected 0 <= t < 5"),
    (ALL, {"t": -1}, ValueError, "t is -1, expected 0 <= t < 5"),
    (ALL, {"t": 1.0}, TypeError, "t is a float"),
    (ALL, {"t": True}, TypeError, "t is a bool"),
    (ALL, {"t": None}, TypeError, "t is a NoneType"),
    (ALL, {"t": [0, 1, 2, 3]}, TypeError, "t is a list"),
    (NOISY, {"noise": X[:, :5]}, ValueError, "noise has shape"),
    (NOISY, {"noise": X[:1]}, ValueError, "noise has shape"),
    (NOISY, {"noise": X.half()}, TypeError, "noise has dtype"),
    (NOISY, {"noise": X.double()}, TypeError, "noise has dtype"),
    (NOISY, {"noise": X, "rng": Philox(0)}, ValueError, "noise and rng are both given"),
    (NOISY, {"rng": 0}, TypeError, "rng is a int"),
    (NOISY, {"rng": torch.Generator()}, TypeError, "rng is a Generator"),
    (NOISY, {"rng": Philox(0, IDS[:3])}, ValueError, "sample_ids has shape"),
    (NOISY, {"rng": Philox(0, IDS - 1)}, ValueError, "sample_ids"),
    (NOISY, {"rng": Philox(0, IDS + (2**56 - 3))}, ValueError, "sample_ids"),
    (NOISY, {"rng": Philox(0, 2**56 - 3)}, ValueError, "sample_ids"),
    (NOISY, {"out": X[:, :5].clone()}, ValueError, "out has shape"),
    (NOISY, {"out": X[:1].clone()}, ValueError, "out has shape"),
    (NOISY, {"out": X.half()}, TypeError, "out has dtype"),
]
# of the kernels alone
FUSED = [
    (ALL, {"x": X.double(), "y": X.double()}, TypeError, "{x} has dtype Double.*backend"),
    (TWO, {"y": X.double()}, TypeError, "{y} has dtype"),
    (TWO, {"x": X.half()}, TypeError, "{y} has dtype Float, expected that of {x}, Half"),
    (TWO, {"x": X.half(), "y": X.bfloat16()}, TypeError, "{y} has dtype"),
    (ALL, {"table": torch.zeros(5, 8, dtype=torch.float64)}, TypeError, "table has dtype"),
    (ALL, {"table": torch.zeros(5, 7)}, ValueError, "table has shape"),
    (ALL, {"table": torch.zeros(8)}, ValueError, "table has shape"),
    (ALL, {"table": torch.zeros(0, 8), "t": 0}, ValueError, "table has shape"),
    (["reverse_step"], {"table": torch.zeros(8, 5).t()}, ValueError, "table has shape"),
    (["forward_process"], {"table": torch.zeros(2, 5).t()}, ValueError, "table has shape"),
    (["reverse_step"], {"clip": (1.0, -1.0)}, ValueError, "clip is"),
    (["reverse_step"], {"clip": (math.nan, 1.0)}, ValueError, "clip is"),
    (NOISY, {"noise": 1.0}, TypeError, "noise is a float"),
]


def cases(listed, only=ALL):
    return [
        pytest.param(name, arguments, error, message, id=f"{name}-{message}")
        for names, arguments, error, message in listed
        for name in names
        if name in only
    ]


@pytest.mark.parametrize("backend", [ops, reference])
@pytest.mark.parametrize(("name", "arguments", "error", "message"), cases(COMMON))
def test_refused_by_both(backend, name, arguments, error, message):
    refused(backend, name, arguments, error, message)


@pytest.mark.parametrize(("name", "arguments", "error", "message"), cases(FUSED))
def test_refused_by_the_kernels(name, arguments, error, message):
    refused(ops, name, arguments, error, message)


@pytest.mark.parametrize(("name", "arguments", "error", "message"), cases(COMMON[:-3] + FUSED, NOISY))
def test_nothing_is_written_before_a_refusal(name, arguments, error, message):
    out = torch.full_like(arguments.get("x", X), 1)
    refused(ops, name, arguments | {"out": out}, error, message)
    assert (out == 1).all()


@pytest.mark.parametrize("name", TWO)
def test_second_tensor_on_another_device_is_refused(name):
    with pytest.raises(ValueError, match="meta"):
        call(ops, name, {"y": X.to("meta")})


def test_check_reverse_step_says_what_reverse_step_would():
    for names, arguments, error, message in COMMON + FUSED:
        if "reverse_step" not in names or "clip" in arguments:
            continue
        given = {"x": X, "t": T, "table": TABLE} | arguments
        if "y" in given and "x" not in arguments:
            continue
        given.pop("y", None)
        if given["x"].dtype == torch.half:
            continue  # only together with the model's output
        with pytest.raises(error, match=message.format(x="x_t", y="")):
            ops.check_reverse_step(given.pop("x"), given.pop("table"), given.pop("t"), **given)
    assert ops.check_reverse_step(X, TABLE, T, noise=X, out=X.clone()) is None
