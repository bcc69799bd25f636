"""The step with options: where it writes its results, in place or not, and what it refuses before it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.choices import for_many
from support.devices import moved
from support.refusals import raises
from support.step_inputs import LIKE_X, OF_MODEL, PER_SAMPLE, READ, RESULTS, make_table, options

from ddpm_ext import Philox, ops, reference
from ddpm_ext.ops.row import WIDTH

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = (4, 4, 3, 7)
TABLE = make_table(5, c_in=1.0)
WRITTEN = pytest.mark.parametrize("result", RESULTS)


def ones(*shape: int, **kinds: Any) -> torch.Tensor:
    return torch.ones(shape or SHAPE, **kinds)


def arguments(device: torch.device, dtype: torch.dtype = F32, **changes: Any) -> dict[str, Any]:
    """Good arguments for all options and results at once. `changes` replace some; those that are ... are left out."""
    x, m, z = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    given = {"x_t": x, "model_output": m, "table": TABLE, "t": torch.tensor([4, 1, 0, 2]), "noise": z}
    given |= options(SHAPE, dtype, dtype) | {name: torch.zeros_like(x) for name in RESULTS} | changes
    return moved({name: value for name, value in given.items() if value is not ...}, device)


# --------------------------------------------------------------------------------------------------- where results go


@for_many(200)
def test_results_in_any_place(device, choose):
    """Memory of any strides, or an argument's: in a loop, the next sample is written over the sample, say."""
    dtype = choose.one_of([F32, F16, BF16], "dtype")
    expected, given = arguments(device, dtype), arguments(device, dtype)
    backend = choose.one_of([ops, ops, reference], "backend")
    backend.step_with_options(**expected)
    if choose.one_of([False, True], "channels last"):
        like_x = (*READ, *RESULTS)
        given = {n: v.to(memory_format=torch.channels_last) if n in like_x else v for n, v in given.items()}
    free = [*READ]
    for result in RESULTS:
        kind = choose.one_of(["an argument", "an argument", "new", "apart"], result)
        if kind == "an argument":
            given[result] = given[free.pop(choose.integer(0, len(free) - 1, "argument"))]
        if kind == "apart":
            given[result] = torch.zeros(*SHAPE, 2, dtype=dtype, device=device)[..., 1]
    assert backend.step_with_options(**given) is given["out"]
    assert all(torch.equal(given[name], expected[name]) for name in RESULTS)


def test_autograd_learns_that_results_changed(device):
    given, x = arguments(device), torch.ones(SHAPE, device=device, requires_grad=True)
    ops.step_with_options(**given)
    losses = [(x * given[name]).sum() for name in RESULTS]
    ops.step_with_options(**given)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    expected = given["out"].clone()
    with torch.inference_mode():
        given = arguments(device)
        given["out"] = given["x_t"]
        assert torch.equal(ops.step_with_options(**given), expected)


# --------------------------------------------------------------------------------------------------------- refusals


def refuse(backend, device, error, words, **changes):
    """The message is one sentence that matches each pattern of `words`, and nothing was written."""
    given = arguments(device, **changes)
    dense = [v for v in given.values() if isinstance(v, torch.Tensor) and v.layout == torch.strided]
    tensors = [v for v in dense if v.device != META]
    copies = [v.clone() for v in tensors]
    raises(error, words, lambda: backend.step_with_options(**given), device)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


TENSOR = {
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
FLOAT16 = {"float16": (lambda: ones(dtype=F16), TypeError, ["float16|Half", "float32|Float"])}
SCALE = {
    "too short": (lambda: ones(3), ValueError, ["3", "4"]),
    "broadcastable": (lambda: ones(1), ValueError, ["1", "4"]),
    "2-dimensional": (lambda: ones(4, 1), ValueError, ["4, 1"]),
    "device": (lambda: ones(4, device=META), ValueError, ["meta"]),
    "float64": (lambda: ones(4, dtype=F64), TypeError, ["float64|Double", "float32"]),
    "float16": (lambda: ones(4, dtype=F16), TypeError, ["float16|Half", "float32"]),
    "number": (lambda: 2.0, TypeError, ["float"]),
}
KINDS = [(("model_output", *OF_MODEL), TENSOR), ((*LIKE_X, "noise"), TENSOR | FLOAT16), (RESULTS, TENSOR | FLOAT16)]


@BACKENDS
@pytest.mark.parametrize(
    "name, make, error, words",
    [
        pytest.param(name, *case, id=f"{name}-{label}")
        for names, cases in (*KINDS, (PER_SAMPLE, SCALE))
        for name in names
        for label, case in cases.items()
        # All bad values of one argument of each kind; of the others a wrong shape and a wrong type.
        if name == names[0] or label in ("broadcastable", "float64")
    ],
)
def test_given_tensors(backend, device, name, make, error, words):
    refuse(backend, device, error, [rf"\b{name}\b", *words], **{name: make()})


@pytest.mark.parametrize("name", ("model_output", *LIKE_X, *OF_MODEL))
def test_another_layout(name):
    refuse(ops, CPU, ValueError, [rf"\b{name}\b", "Sparse"], **{name: ones().to_sparse()})


@BACKENDS
def test_the_models_dtype_is_one(backend, device):
    narrow = {name: ones(dtype=F16) for name in ("model_output", *OF_MODEL)}
    backend.step_with_options(**arguments(device, **narrow))
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
        (["mask", "without known"], {"known": None}),
        (["known", "without mask"], {"mask": None}),
        ([r"\buncond_output\b", "without model_output"], {"model_output": None}),
        ([r"\bnoise\b", r"\brng\b"], {"rng": Philox(0)}),
        ([r"\bt\b", "5"], {"t": 5}),
        ([r"\bt\b", "-1"], {"t": -1}),
        ([r"\bt\b", "3", "4"], {"t": torch.tensor([0, 1, 2])}),
        ([r"\btable\b", "5, 8", "24"], {"table": torch.zeros(5, 8)}),
    ],
)
def test_what_does_not_go_together(backend, device, words, changes):
    refuse(backend, device, ValueError, words, **changes)


@pytest.mark.parametrize(
    "error, words, changes",
    [
        (ValueError, [r"\btable\b", "5, 24"], {"table": torch.zeros(WIDTH, 5).t()}),
        (ValueError, [r"\btable\b", "address"], {"table": torch.zeros(5 * WIDTH + 1)[1:].view(5, WIDTH)}),
        (TypeError, [r"\btable\b", "Double"], {"table": torch.zeros(5, WIDTH, dtype=F64)}),
        (ValueError, [r"\bclip\b", "1", "-1"], {"clip": (1.0, -1.0)}),
        (ValueError, ["sample_ids"], {"noise": ..., "rng": Philox(0, torch.arange(3))}),
        (TypeError, ["x_t", "list"], {"x_t": [1.0]}),
        (TypeError, ["x_t", "Double", "reference"], {"x_t": ones(dtype=F64)}),
    ],
)
def test_the_steps_own_arguments(device, error, words, changes):
    if device.type == "cuda" and "address" in words:
        changes = {"table": torch.zeros(5 * WIDTH + 1, device=device)[1:].view(5, WIDTH)}  # a copy would be aligned
    refuse(ops, device, error, words, **changes)


@pytest.mark.parametrize(("result", "name"), [*((r, "x_t") for r in RESULTS), *(("out", n) for n in READ[1:])])
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
    view, words = memory[:336].view(SHAPE), [rf"\b{result}\b", "shares memory"]
    refuse(ops, device, ValueError, words, **{result: view, "table": memory[320 : 320 + 5 * WIDTH].view(5, WIDTH)})
    for name in PER_SAMPLE:
        refuse(ops, device, ValueError, words, **{result: view, name: memory[332:336]})
    numbers = torch.zeros(336, dtype=torch.int64, device=device)
    view = numbers.view(F32)[:336].view(SHAPE)
    refuse(ops, device, ValueError, words, **{result: view, "t": numbers[:4]})
    for rng in (Philox(0, numbers[:4]), Philox(numbers[7]), Philox(0, draw=numbers[7])):
        refuse(ops, device, ValueError, words, **{result: view, "noise": ..., "rng": rng})


def test_a_gradient_is_refused(device):
    for name in (*READ, *PER_SAMPLE, *RESULTS):
        given = arguments(device)
        given[name].requires_grad_()
        with pytest.raises(ValueError, match=rf"{name} requires a gradient.*expected none"):
            ops.step_with_options(**given)
        with torch.no_grad():
            given["out"] = torch.empty(SHAPE, device=device)
            assert not ops.step_with_options(**given).requires_grad


def test_a_forward_mode_derivative_is_refused(device):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ones(device=device), ones(device=device))
        for name in ("history1", "gradient"):
            with pytest.raises(NotImplementedError, match=f"{name} has a forward-mode derivative"):
                ops.step_with_options(**arguments(device, **{name: dual}))
