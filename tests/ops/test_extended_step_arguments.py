"""The extended step: where it writes its results, in place or not, and what it refuses before it writes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import moved
from support.extended import LIKE_X, OF_MODEL, PER_SAMPLE, RESULTS, make_table, options

from ddpm_ext import Philox, ops, reference

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = (4, 4, 3, 7)
TABLE = make_table(5)
WRITTEN = pytest.mark.parametrize("result", RESULTS)
READ = ("x_t", "model_output", "noise", *LIKE_X, *OF_MODEL)


def ones(*shape: int, **kinds: Any) -> torch.Tensor:
    return torch.ones(shape or SHAPE, **kinds)


def arguments(device: torch.device, dtype: torch.dtype = F32, **changes: Any) -> dict[str, Any]:
    """Good arguments for all options and results at once. `changes` replace some; those that are ... are left out."""
    x, m, z = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    given = {"x_t": x, "model_output": m, "table": TABLE, "t": torch.tensor([4, 1, 0, 2]), "noise": z}
    given |= options(SHAPE, dtype, dtype) | {name: torch.zeros_like(x) for name in RESULTS} | changes
    return moved({name: value for name, value in given.items() if value is not ...}, device)


# --------------------------------------------------------------------------------------------------- where results go


@BACKENDS
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_results_are_filled(device, backend, dtype):
    given = arguments(device, dtype, **dict.fromkeys(RESULTS, ...))
    expected = backend.extended_step(**given)
    results = {name: torch.full_like(expected, float("nan")) for name in RESULTS}
    got = backend.extended_step(**given, **results)
    assert got is results["out"]
    assert torch.equal(got, expected) and torch.equal(results["out_copy"], expected)
    # a row whose result is x0 itself gives the same x0
    alone = torch.zeros_like(TABLE)
    alone[:, [0, 1, 10, 14]], alone[:, 2] = TABLE[:, [0, 1, 10, 14]], 1
    plain = {name: value for name, value in given.items() if name not in ("mask", "known", "noise", "model_variance")}
    x0 = backend.extended_step(**{**plain, "table": alone.to(device)}, add_noise=False)
    assert torch.equal(results["x0_out"], x0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@WRITTEN
def test_each_result_in_the_place_of_each_argument(device, dtype, memory, result):
    form = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    expected = arguments(device, dtype)
    ops.extended_step(**expected)
    for name in READ:
        given = arguments(device, dtype)
        given = {n: v.to(memory_format=form) if n in (*READ, *RESULTS) else v for n, v in given.items()}
        given[result] = given[name]
        ops.extended_step(**given)
        for other in RESULTS:
            assert torch.equal(given[other], expected[other]), (name, other)


@BACKENDS
def test_all_in_place(device, backend):
    """In place, as in a loop: the next sample over the sample, x0 over the previous x0."""
    expected, given = arguments(device), arguments(device)
    backend.extended_step(**expected)
    given |= {"out": given["x_t"], "x0_out": given["history"], "out_copy": given["noise"]}
    backend.extended_step(**given)
    assert all(torch.equal(given[name], expected[name]) for name in RESULTS)


def test_halves_of_one_output(device):
    """Halves of a doubled batch, of doubled channels and of both give the bits of copies."""
    batches, channels = torch.randn(8, *SHAPE[1:], device=device), torch.randn(4, 8, *SHAPE[2:], device=device)
    both = torch.randn(8, 8, *SHAPE[2:], device=device)
    for halves in (
        dict(zip(("uncond_output", "model_output"), batches.chunk(2), strict=True)),
        dict(zip(("model_output", "model_variance"), channels.chunk(2, 1), strict=True)),
        {"uncond_output": both[:4, :4], "model_output": both[4:, :4], "model_variance": both[4:, 4:]},
    ):
        copies = {name: half.clone(memory_format=torch.contiguous_format) for name, half in halves.items()}
        assert not all(half.is_contiguous() and half.storage_offset() == 0 for half in halves.values())
        got = ops.extended_step(**arguments(device, **halves, **dict.fromkeys(RESULTS, ...)))
        assert torch.equal(got, ops.extended_step(**arguments(device, **copies, **dict.fromkeys(RESULTS, ...))))


@WRITTEN
def test_autograd_learns_that_results_changed(device, result):
    given = arguments(device)
    before = {name: given[name]._version for name in RESULTS}
    ops.extended_step(**given)
    assert all(given[name]._version > before[name] for name in RESULTS)
    x = torch.ones(SHAPE, device=device, requires_grad=True)
    loss = (x * given[result]).sum()
    ops.extended_step(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(device):
    expected = ops.extended_step(**arguments(device))
    with torch.inference_mode():
        given = arguments(device)
        assert torch.equal(ops.extended_step(**given), expected)
        given["out"] = given["x_t"]
        ops.extended_step(**given)
        assert torch.equal(given["x_t"], expected)


# --------------------------------------------------------------------------------------------------------- refusals


def refuse(backend, device, error, words, **changes):
    """The message is one sentence that matches each pattern of `words`, and nothing was written."""
    given = arguments(device, **changes)
    dense = [v for v in given.values() if isinstance(v, torch.Tensor) and v.layout == torch.strided]
    tensors = [v for v in dense if v.device != META]
    copies = [v.clone() for v in tensors]
    with pytest.raises(error) as info:
        backend.extended_step(**given)
    message = str(info.value)
    assert type(info.value) in (TypeError, ValueError)
    for word in (*words, "expected"):
        assert re.search(word, message), f"{word!r} is not in {message!r}"
    assert "\n" not in message
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


LIKE = {
    "batch": (lambda: ones(3, 4, 3, 7), ValueError, [r"3, 4, 3, 7", r"4, 4, 3, 7"]),
    "broadcastable": (lambda: ones(4, 1, 3, 7), ValueError, [r"4, 1, 3, 7", r"4, 4, 3, 7"]),
    "flat": (lambda: ones(4, 84), ValueError, [r"4, 84"]),
    "0-dimensional": (lambda: torch.tensor(1.0), ValueError, [r"4, 4, 3, 7"]),
    "device": (lambda: ones(device=META), ValueError, ["meta"]),
    "int64": (lambda: ones(dtype=torch.int64), TypeError, ["int64|Long"]),
    "float64": (lambda: ones(dtype=F64), TypeError, ["float64|Double"]),
    "numpy": (lambda: np.ones(SHAPE, dtype=np.float32), TypeError, ["ndarray"]),
    "float": (lambda: 0.5, TypeError, ["float"]),
}
NARROW = {"float16": (lambda: ones(dtype=F16), TypeError, ["float16|Half", "float32|Float"])}
SCALE = {
    "too short": (lambda: ones(3), ValueError, ["3", "4"]),
    "broadcastable": (lambda: ones(1), ValueError, ["1", "4"]),
    "2-dimensional": (lambda: ones(4, 1), ValueError, ["4, 1"]),
    "device": (lambda: ones(4, device=META), ValueError, ["meta"]),
    "float64": (lambda: ones(4, dtype=F64), TypeError, ["float64|Double", "float32"]),
    "float16": (lambda: ones(4, dtype=F16), TypeError, ["float16|Half", "float32"]),
    "number": (lambda: 2.0, TypeError, ["float"]),
}


@BACKENDS
@pytest.mark.parametrize(
    "name, make, error, words",
    [
        pytest.param(name, *case, id=f"{name}-{label}")
        for names, cases in (
            (("model_output", *OF_MODEL), LIKE),
            (("noise", *LIKE_X, *RESULTS), LIKE | NARROW),
            (PER_SAMPLE, SCALE),
        )
        for name in names
        for label, case in cases.items()
    ],
)
def test_given_tensors(backend, device, name, make, error, words):
    refuse(backend, device, error, [rf"\b{name}\b", *words], **{name: make()})


@pytest.mark.parametrize("name", ["model_output", *LIKE_X, *OF_MODEL])
def test_another_layout(name):
    refuse(ops, CPU, ValueError, [rf"\b{name}\b", "Sparse"], **{name: ones().to_sparse()})


@BACKENDS
def test_the_models_dtype_is_one(backend, device):
    narrow = {name: ones(dtype=F16) for name in ("model_output", *OF_MODEL)}
    backend.extended_step(**arguments(device, **narrow))
    for name in OF_MODEL:
        for dtype in (F32, BF16):
            words = [rf"\b{name}\b", "float32|Float|bfloat16|BFloat16", "model_output", "float16|Half"]
            refuse(backend, device, TypeError, words, **narrow | {name: ones(dtype=dtype)})
    words = [r"\bmodel_output\b", "float32|Float", "float16|Half"]
    changes = {name: value.half() for name, value in arguments(CPU).items() if name in (*READ, *RESULTS)}
    refuse(backend, device, TypeError, words, **changes | {"model_output": ones()})


@BACKENDS
@pytest.mark.parametrize(
    "words, changes",
    [
        ([r"\buncond_output\b", "without model_output"], {"model_output": None}),
        ([r"\bmask\b", "without known"], {"known": None}),
        ([r"\bknown\b", "without mask"], {"mask": None}),
        ([r"\bnoise\b", r"\brng\b"], {"rng": Philox(0)}),
        ([r"\bt\b", "5"], {"t": 5}),
        ([r"\bt\b", "-1"], {"t": -1}),
        ([r"\bt\b", "3", "4"], {"t": torch.tensor([0, 1, 2])}),
    ],
)
def test_what_does_not_go_together(backend, device, words, changes):
    refuse(backend, device, ValueError, words, **changes)


@pytest.mark.parametrize(
    "error, words, changes",
    [
        (ValueError, [r"\btable\b", "5, 8", "16"], {"table": TABLE[:, :8].contiguous()}),
        (ValueError, [r"\btable\b", "5, 16"], {"table": TABLE.t().contiguous().t()}),
        (TypeError, [r"\btable\b", "Double"], {"table": TABLE.double()}),
        (ValueError, [r"\bclip\b", "1", "-1"], {"clip": (1.0, -1.0)}),
        (ValueError, ["sample_ids"], {"noise": ..., "rng": Philox(0, torch.arange(3))}),
        (TypeError, ["x_t", "list"], {"x_t": [1.0]}),
        (TypeError, ["x_t", "Double", "reference"], {"x_t": ones(dtype=F64)}),
    ],
)
def test_the_steps_own_arguments(device, error, words, changes):
    refuse(ops, device, error, words, **changes)


def test_a_table_that_is_not_aligned(device):
    memory = torch.zeros(TABLE.numel() + 1, device=device)[1:].view(TABLE.shape)
    refuse(ops, device, ValueError, [r"\btable\b", "address"], table=memory)


@WRITTEN
@pytest.mark.parametrize("name", READ)
def test_results_that_overlap_an_argument_in_part(device, result, name):
    memory = torch.randn(5, *SHAPE[1:], device=device)
    words = [rf"\b{result}\b", "shares memory"]
    refuse(ops, device, ValueError, words, **{name: memory[:4], result: memory[1:]})
    square = torch.randn(4, 3, 7, 7, device=device)
    changes = {n: square.clone() for n in (*READ, *RESULTS)} | {name: square, result: square.mT}
    refuse(ops, device, ValueError, words, **changes)


@WRITTEN
def test_results_that_overlap(device, result):
    words = [rf"\b{result}\b", "share memory"]
    refuse(ops, device, ValueError, words, **{result: torch.randn(1, *SHAPE[1:], device=device).expand(SHAPE)})
    for other in set(RESULTS) - {result}:
        memory = torch.randn(SHAPE, device=device)
        refuse(ops, device, ValueError, [result, other, "shares memory"], **{result: memory, other: memory})


@WRITTEN
def test_results_in_what_all_elements_share(device, result):
    """A table or scales are still read when some of the result is written already."""
    memory = torch.randn(500, device=device)
    view = memory[:336].view(SHAPE)
    words = [rf"\b{result}\b", "shares memory"]
    refuse(ops, device, ValueError, words, **{result: view, "table": memory[256:336].view(5, 16)})
    for name in PER_SAMPLE:
        refuse(ops, device, ValueError, words, **{result: view, name: memory[332:336]})
    numbers = torch.zeros(336, dtype=torch.int64, device=device)
    view = numbers.view(F32)[:336].view(SHAPE)
    refuse(ops, device, ValueError, words, **{result: view, "t": numbers[:4]})
    ids = {"noise": ..., "rng": Philox(0, numbers[:4])}
    refuse(ops, device, ValueError, words, **{result: view, **ids})
    refuse(ops, device, ValueError, words, **{result: view, "noise": ..., "rng": Philox(numbers[7])})


@pytest.mark.parametrize("name", [*READ, *PER_SAMPLE, *RESULTS])
def test_a_gradient_is_refused(device, name):
    given = arguments(device)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires a gradient.*expected none"):
        ops.extended_step(**given)
    with torch.no_grad():
        assert not ops.extended_step(**given | {"out": torch.empty(SHAPE, device=device)}).requires_grad


def test_a_forward_mode_derivative_is_refused(device):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ones(device=device), ones(device=device))
        with pytest.raises(NotImplementedError, match="gradient has a forward-mode derivative"):
            ops.extended_step(**arguments(device, gradient=dual))
