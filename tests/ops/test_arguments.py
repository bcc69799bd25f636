"""A bad argument of an operator raises a ValueError or TypeError that names it, before anything is written."""

from __future__ import annotations

import math

import pytest
import torch
from support.devices import moved
from support.step_inputs import make_table
from torch.testing._internal.two_tensor import TwoTensor

from ddpm_ext import Philox, ops, reference
from ddpm_ext.ops.row import WIDTH

X, TABLE, AFFINE, T = torch.zeros(4, 6), make_table(5), torch.zeros(5, 2), torch.tensor([0, 1, 2, 4])
IDS = torch.arange(4)
CPU = torch.device("cpu")


TENSORS = {
    "reverse_step": ("x_t", "model_output"),
    "forward_process": ("x_start",),
    "predict_start": ("x_t", "noise"),
    "posterior_mean": ("x_start", "x_t"),
}


def call(backend, name, arguments, device):
    given = {"x": X, "y": X, "t": T, "table": TABLE if name == "reverse_step" else AFFINE} | arguments
    given = moved(given, device)
    tensors = [given.pop("x"), given.pop("y")][: len(TENSORS[name])]
    return getattr(backend, name)(*tensors, given.pop("table"), given.pop("t"), **given)


def refused(backend, name, arguments, error, message, device):
    """Before anything is written."""
    out = torch.ones(X.shape, device=device)
    if name in NOISY and not {"x", "out"} & set(arguments):
        arguments = {**arguments, "out": out}
    with pytest.raises(error, match=message.format(x=TENSORS[name][0], y=TENSORS[name][-1])):
        call(backend, name, arguments, device)
    assert (out == 1).all()


ALL = ["reverse_step", "forward_process", "predict_start", "posterior_mean"]
TWO = ["reverse_step", "predict_start", "posterior_mean"]
NOISY = ["reverse_step", "forward_process"]

# refused by both backends: operators, arguments, error, message
COMMON = [
    (ALL, {"x": X.long(), "y": X.long()}, TypeError, "{x} has dtype"),
    (ALL, {"x": X.bool()}, TypeError, "{x} has dtype"),
    (ALL, {"x": X[0, 0], "y": X[0, 0], "t": 0}, ValueError, "{x} is 0-dimensional"),
    (TWO, {"y": X[:, :5]}, ValueError, "{y} has shape .*4, 5.* expected .*4, 6"),
    (TWO, {"y": X.long()}, TypeError, "{y} has dtype"),
    (ALL, {"t": T.int()}, TypeError, "t has dtype"),
    (ALL, {"t": T[:3]}, ValueError, "t has shape .*3.* expected .*4"),
    (ALL, {"t": T[0]}, ValueError, "t has shape"),
    (ALL, {"t": 5}, ValueError, "t is 5, expected 0 <= t < 5"),
    (ALL, {"t": -1}, ValueError, "t is -1, expected 0 <= t < 5"),
    (ALL, {"t": 1.0}, TypeError, "t is a float"),
    (ALL, {"t": True}, TypeError, "t is a bool"),
    (ALL, {"t": None}, TypeError, "t is a NoneType"),
    (NOISY, {"noise": X[:, :5]}, ValueError, "noise has shape"),
    (NOISY, {"noise": X.half()}, TypeError, "noise has dtype"),
    (NOISY, {"noise": X, "rng": Philox(0)}, ValueError, "noise and rng are both given"),
    (NOISY, {"rng": 0}, TypeError, "rng is a int"),
    (NOISY, {"add_noise": torch.ones(2)}, TypeError, "add_noise is tensor.*, expected a bool"),
    (NOISY, {"rng": Philox(0, IDS[:3])}, ValueError, "sample_ids has shape"),
    (NOISY, {"rng": Philox(0, 2**56 - 3)}, ValueError, "sample_ids"),
    (ALL, {"table": None}, TypeError, "table is a NoneType, expected a tensor"),
    (["reverse_step"], {"clip": True}, TypeError, r"clip is True, expected \(low, high\) or None"),
    (["reverse_step"], {"clip": ("0", "1")}, TypeError, r"clip is \('0', '1'\), expected \(low, high\) or None"),
    (["reverse_step"], {"clip": (1.0, -1.0)}, ValueError, r"clip is \(1.0, -1.0\), expected low <= high"),
    (["reverse_step"], {"clip": (math.nan, 1.0)}, ValueError, "clip is .*nan.*, expected low <= high"),
    (NOISY, {"out": X[:, :5].clone()}, ValueError, "out has shape"),
    (NOISY, {"out": X.half()}, TypeError, "out has dtype"),
]
# refused by both backends, on the CPU only: values in tensors, which are not read back from a GPU
VALUES = [
    (ALL, {"t": torch.tensor([0, 1, 5, 2])}, ValueError, "t.* is .*5.* expected 0 <= t <"),
    (ALL, {"t": torch.tensor([0, -1, 3, 2])}, ValueError, "t.* is .*-1.* expected 0 <= t <"),
    (NOISY, {"rng": Philox(0, IDS - 1)}, ValueError, "sample_ids"),
    (NOISY, {"rng": Philox(0, IDS + (2**56 - 3))}, ValueError, "sample_ids"),
]
# refused by the kernels only
FUSED = [
    (ALL, {"x": X.double(), "y": X.double()}, TypeError, "{x} has dtype Double.*backend"),
    (TWO, {"x": X.half()}, TypeError, "{y} has dtype Float, expected that of {x}, Half"),
    (TWO, {"x": X.half(), "y": X.bfloat16()}, TypeError, "{y} has dtype"),
    (ALL, {"table": torch.zeros(5, WIDTH, dtype=torch.float64)}, TypeError, "table has dtype"),
    (ALL, {"table": torch.zeros(5, 7)}, ValueError, "table has shape"),
    (ALL, {"table": torch.zeros(WIDTH)}, ValueError, "table has shape"),
    (ALL, {"table": torch.zeros(0, WIDTH), "t": 0}, ValueError, "table has shape"),
    (["reverse_step"], {"table": torch.zeros(WIDTH, 5).t()}, ValueError, "table has shape"),
    (["forward_process"], {"table": torch.zeros(2, 5).t()}, ValueError, "table has shape"),
    (NOISY, {"noise": 1.0}, TypeError, "noise is a float"),
]


# All of these are for the first operator that has the argument; its checks are the others' too, which get a few.
FURTHER = ("{x} has dtype", "{y} has shape .*4, 5", "t is 5", "t.* is .*-1", "noise and rng", "out has", "sample_ids")


def cases(listed):
    return [
        pytest.param(name, arguments, error, message, id=f"{name}-{message}")
        for names, arguments, error, message in listed
        for name in names
        if name == names[0] or message.startswith(FURTHER) or "table" in arguments
    ]


@pytest.mark.parametrize("backend", [ops, reference])
@pytest.mark.parametrize(("name", "arguments", "error", "message"), cases(COMMON))
def test_refused_by_both(backend, name, arguments, error, message, device):
    refused(backend, name, arguments, error, message, device)


@pytest.mark.parametrize("backend", [ops, reference])
@pytest.mark.parametrize(("name", "arguments", "error", "message"), cases(VALUES))
def test_values_are_refused_on_the_cpu(backend, name, arguments, error, message):
    refused(backend, name, arguments, error, message, CPU)


@pytest.mark.cuda
def test_values_are_not_read_back_from_a_gpu(device):
    """There the kernels use the nearest row, and the lower 56 bits of an id."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tables = {columns: torch.rand(5, columns, generator=torch.Generator().manual_seed(1)) for columns in (2, WIDTH)}
    for names, arguments, *_ in VALUES:
        for name in names:
            given = {"x": x, "y": x.flip(0), "table": tables[WIDTH if name == "reverse_step" else 2]} | arguments
            if name in NOISY:
                given.setdefault("rng", Philox(0))
            nearest = given | {"t": given.get("t", T).clamp(0, 4)}
            if "rng" in arguments:
                nearest["rng"] = Philox(0, arguments["rng"].sample_ids % 2**56)
            assert torch.equal(call(ops, name, given, device), call(ops, name, nearest, device)), (name, arguments)


@pytest.mark.parametrize(("name", "arguments", "error", "message"), cases(FUSED))
def test_refused_by_the_kernels(name, arguments, error, message, device):
    refused(ops, name, arguments, error, message, device)


# made when they are used, since torch warns of them
KINDS = {
    "is a quantized tensor|has dtype torch.qint8": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "is a nested tensor, expected a plain one": lambda: torch.nested.nested_tensor([X[0, :3], X[0]]),
    "has layout .*, expected": X.to_sparse,
}


@pytest.mark.filterwarnings("ignore:.*(quantize|nested)")
@pytest.mark.parametrize("backend", [ops, reference])
@pytest.mark.parametrize("message", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_tensors_of_other_kinds_are_refused(backend, name, message):
    other = KINDS[message]()
    refused(backend, name, {"x": other, "y": other}, (TypeError, ValueError), f"{{x}} ({message})", CPU)
    if name in TWO:
        refused(backend, name, {"y": other}, (TypeError, ValueError), f"{{y}} ({message})", CPU)
    if name in NOISY:
        refused(backend, name, {"out": other}, (TypeError, ValueError), f"out ({message})", CPU)


@pytest.mark.parametrize("name", TWO)
def test_second_tensor_on_another_device_is_refused(name, device):
    with pytest.raises(ValueError, match="meta"):
        call(ops, name, {"y": X.to("meta")}, device)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_numbers_on_another_device_are_refused(name, grad, device):
    """Also where torch's dispatcher is called, which would take the kernel of that device."""
    number, x = torch.tensor(0, device="meta"), X.clone().requires_grad_(grad)
    for rng, message in ((Philox(number), "seed is on meta"), (Philox(0, draw=number), "draw is on meta")):
        with pytest.raises(ValueError, match=message):
            call(ops, name, {"x": x, "rng": rng}, device)


@pytest.mark.parametrize("name", NOISY)
def test_a_seed_may_be_of_a_subclass(name, device):
    result = call(ops, name, {"rng": Philox(TwoTensor(torch.tensor(5), torch.tensor(6)))}, device)
    for part, seed in ((result.a, 5), (result.b, 6)):
        assert torch.equal(part, call(ops, name, {"rng": Philox(seed)}, device))


def test_a_table_that_kernels_could_not_read(device):
    """The kernels read a row of a step in pieces of 16 bytes and a row of 8 in one, so that it must be aligned."""
    x, floats = torch.ones(2, 5, device=device), torch.ones(4 * WIDTH + 2, device=device)
    calls = {
        WIDTH: lambda table: ops.reverse_step(x, x, table, 0, add_noise=False),
        2: lambda table: ops.forward_process(x, table, 0, add_noise=False),
    }
    for columns, call in calls.items():
        table, multiple = floats[1 : 1 + 4 * columns].view(4, columns), 16 if columns == WIDTH else 8
        with pytest.raises(ValueError, match=rf"table begins at .*, expected a multiple of {multiple}"):
            call(table)
        assert call(table.clone()).isfinite().all()
        # One row further on it is aligned again.
        assert call(floats[: 4 * columns].view(4, columns)[1:]).isfinite().all()
