"""The extended and the linear step: where they write their results, in place or not, and what they refuse before they
write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support import extended, linear
from support.devices import moved

from ddpm_ext import Philox, ops, reference

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = (4, 4, 3, 7)
TABLE = {step.OPERATOR: step.make_table(5) for step in (extended, linear)}
BOTH = (extended, linear)
STEPS = pytest.mark.parametrize("step", BOTH, ids=lambda step: step.OPERATOR)


def each(names: Callable[[Any], Iterable[str]], argument: str) -> Any:
    """Parametrizes a test by a step and each of some of its arguments."""
    cases = [pytest.param(step, name, id=f"{step.OPERATOR}-{name}") for step in BOTH for name in names(step)]
    return pytest.mark.parametrize(("step", argument), cases)


WRITTEN = each(lambda step: step.RESULTS, "result")


def read(step: Any) -> tuple[str, ...]:
    return ("x_t", "model_output", "noise", *step.LIKE_X, *step.OF_MODEL)


def take(backend: Any, step: Any, **given: Any) -> torch.Tensor:
    return getattr(backend, step.OPERATOR)(**given)


def ones(*shape: int, **kinds: Any) -> torch.Tensor:
    return torch.ones(shape or SHAPE, **kinds)


def arguments(step: Any, device: torch.device, dtype: torch.dtype = F32, **changes: Any) -> dict[str, Any]:
    """Good arguments for all options and results at once. `changes` replace some; those that are ... are left out."""
    x, m, z = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    given = {"x_t": x, "model_output": m, "table": TABLE[step.OPERATOR], "t": torch.tensor([4, 1, 0, 2]), "noise": z}
    given |= step.options(SHAPE, dtype, dtype) | {name: torch.zeros_like(x) for name in step.RESULTS} | changes
    return moved({name: value for name, value in given.items() if value is not ...}, device)


# --------------------------------------------------------------------------------------------------- where results go


@STEPS
@BACKENDS
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_results_are_filled(step, device, backend, dtype):
    given = arguments(step, device, dtype, **dict.fromkeys(step.RESULTS, ...))
    expected = take(backend, step, **given)
    results = {name: torch.full_like(expected, float("nan")) for name in step.RESULTS}
    got = take(backend, step, **given, **results)
    assert got is results["out"]
    assert torch.equal(got, expected) and torch.equal(results["out_copy"], expected)
    # a row whose result is x0 itself gives the same x0
    used = [step.COLUMNS.index(name) for name in ("a", "b", "g0", "w") if name in step.COLUMNS]
    alone = torch.zeros_like(TABLE[step.OPERATOR])
    alone[:, used], alone[:, 2] = TABLE[step.OPERATOR][:, used], 1
    plain = {name: value for name, value in given.items() if name not in ("mask", "known", "noise", "model_variance")}
    x0 = take(backend, step, **{**plain, "table": alone.to(device)}, add_noise=False)
    assert torch.equal(results["x0_out"], x0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@WRITTEN
def test_each_result_in_the_place_of_each_argument(step, device, dtype, memory, result):
    form = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    expected = arguments(step, device, dtype)
    take(ops, step, **expected)
    for name in read(step):
        given = arguments(step, device, dtype)
        given = {n: v.to(memory_format=form) if n in (*read(step), *step.RESULTS) else v for n, v in given.items()}
        given[result] = given[name]
        take(ops, step, **given)
        for other in step.RESULTS:
            assert torch.equal(given[other], expected[other]), (name, other)


@STEPS
@BACKENDS
def test_all_in_place(step, device, backend):
    """In place, as in a loop: the next sample over the sample, what the step keeps over what it needs no more."""
    expected, given = arguments(step, device), arguments(step, device)
    take(backend, step, **expected)
    kept = {"extended_step": ("x0_out", "history"), "linear_step": ("history_out", "history3")}
    result, memory = kept[step.OPERATOR]
    given |= {"out": given["x_t"], result: given[memory], "out_copy": given["noise"]}
    take(backend, step, **given)
    assert all(torch.equal(given[name], expected[name]) for name in step.RESULTS)


@STEPS
def test_halves_of_one_output(step, device):
    """Halves of a doubled batch, of doubled channels and of both give the bits of copies."""
    batches, channels = torch.randn(8, *SHAPE[1:], device=device), torch.randn(4, 8, *SHAPE[2:], device=device)
    both = torch.randn(8, 8, *SHAPE[2:], device=device)
    for halves in (
        dict(zip(("uncond_output", "model_output"), batches.chunk(2), strict=True)),
        dict(zip(("model_output", "model_variance"), channels.chunk(2, 1), strict=True)),
        {"uncond_output": both[:4, :4], "model_output": both[4:, :4], "model_variance": both[4:, 4:]},
    ):
        halves = {name: half for name, half in halves.items() if name in step.INPUTS or name == "model_output"}
        copies = {name: half.clone(memory_format=torch.contiguous_format) for name, half in halves.items()}
        assert not all(half.is_contiguous() and half.storage_offset() == 0 for half in halves.values())
        got = take(ops, step, **arguments(step, device, **halves, **dict.fromkeys(step.RESULTS, ...)))
        assert torch.equal(
            got, take(ops, step, **arguments(step, device, **copies, **dict.fromkeys(step.RESULTS, ...)))
        )


@WRITTEN
def test_autograd_learns_that_results_changed(step, device, result):
    given = arguments(step, device)
    before = {name: given[name]._version for name in step.RESULTS}
    take(ops, step, **given)
    assert all(given[name]._version > before[name] for name in step.RESULTS)
    x = torch.ones(SHAPE, device=device, requires_grad=True)
    loss = (x * given[result]).sum()
    take(ops, step, **given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@STEPS
def test_inference_mode(step, device):
    expected = take(ops, step, **arguments(step, device))
    with torch.inference_mode():
        given = arguments(step, device)
        assert torch.equal(take(ops, step, **given), expected)
        given["out"] = given["x_t"]
        take(ops, step, **given)
        assert torch.equal(given["x_t"], expected)


# --------------------------------------------------------------------------------------------------------- refusals


def refuse(step, backend, device, error, words, **changes):
    """The message is one sentence that matches each pattern of `words`, and nothing was written."""
    given = arguments(step, device, **changes)
    dense = [v for v in given.values() if isinstance(v, torch.Tensor) and v.layout == torch.strided]
    tensors = [v for v in dense if v.device != META]
    copies = [v.clone() for v in tensors]
    with pytest.raises(error) as info:
        take(backend, step, **given)
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
    "step, name, make, error, words",
    [
        pytest.param(step, name, *case, id=f"{step.OPERATOR}-{name}-{label}")
        for step in BOTH
        for names, cases in (
            (("model_output", *step.OF_MODEL), LIKE),
            (("noise", *step.LIKE_X, *step.RESULTS), LIKE | NARROW),
            (step.PER_SAMPLE, SCALE),
        )
        for name in names
        for label, case in cases.items()
    ],
)
def test_given_tensors(step, backend, device, name, make, error, words):
    refuse(step, backend, device, error, [rf"\b{name}\b", *words], **{name: make()})


@each(lambda step: ("model_output", *step.LIKE_X, *step.OF_MODEL), "name")
def test_another_layout(step, name):
    refuse(step, ops, CPU, ValueError, [rf"\b{name}\b", "Sparse"], **{name: ones().to_sparse()})


@STEPS
@BACKENDS
def test_the_models_dtype_is_one(step, backend, device):
    narrow = {name: ones(dtype=F16) for name in ("model_output", *step.OF_MODEL)}
    take(backend, step, **arguments(step, device, **narrow))
    for name in step.OF_MODEL:
        for dtype in (F32, BF16):
            words = [rf"\b{name}\b", "float32|Float|bfloat16|BFloat16", "model_output", "float16|Half"]
            refuse(step, backend, device, TypeError, words, **narrow | {name: ones(dtype=dtype)})
    words = [r"\bmodel_output\b", "float32|Float", "float16|Half"]
    changes = {
        name: value.half() for name, value in arguments(step, CPU).items() if name in (*read(step), *step.RESULTS)
    }
    refuse(step, backend, device, TypeError, words, **changes | {"model_output": ones()})


@BACKENDS
@pytest.mark.parametrize(
    "words, changes", [(["mask", "without known"], {"known": None}), (["known", "without mask"], {"mask": None})]
)
def test_a_mask_and_what_is_known_go_together(backend, device, words, changes):
    refuse(extended, backend, device, ValueError, [rf"\b{words[0]}\b", words[1]], **changes)


@STEPS
@BACKENDS
@pytest.mark.parametrize(
    "words, changes",
    [
        ([r"\buncond_output\b", "without model_output"], {"model_output": None}),
        ([r"\bnoise\b", r"\brng\b"], {"rng": Philox(0)}),
        ([r"\bt\b", "5"], {"t": 5}),
        ([r"\bt\b", "-1"], {"t": -1}),
        ([r"\bt\b", "3", "4"], {"t": torch.tensor([0, 1, 2])}),
    ],
)
def test_what_does_not_go_together(step, backend, device, words, changes):
    refuse(step, backend, device, ValueError, words, **changes)


@STEPS
@pytest.mark.parametrize(
    "error, words, changes",
    [
        (ValueError, [r"\btable\b", "5, 8", "16"], {"table": torch.zeros(5, 8)}),
        (ValueError, [r"\btable\b", "5, 16"], {"table": torch.zeros(16, 5).t()}),
        (TypeError, [r"\btable\b", "Double"], {"table": torch.zeros(5, 16, dtype=F64)}),
        (ValueError, [r"\bclip\b", "1", "-1"], {"clip": (1.0, -1.0)}),
        (ValueError, ["sample_ids"], {"noise": ..., "rng": Philox(0, torch.arange(3))}),
        (TypeError, ["x_t", "list"], {"x_t": [1.0]}),
        (TypeError, ["x_t", "Double", "reference"], {"x_t": ones(dtype=F64)}),
    ],
)
def test_the_steps_own_arguments(step, device, error, words, changes):
    refuse(step, ops, device, error, words, **changes)


@STEPS
def test_a_table_that_is_not_aligned(step, device):
    memory = torch.zeros(5 * 16 + 1, device=device)[1:].view(5, 16)
    refuse(step, ops, device, ValueError, [r"\btable\b", "address"], table=memory)


@pytest.mark.parametrize(
    ("step", "result", "name"),
    [
        pytest.param(step, result, name, id=f"{step.OPERATOR}-{result}-{name}")
        for step in BOTH
        for result in step.RESULTS
        for name in read(step)
    ],
)
def test_results_that_overlap_an_argument_in_part(step, device, result, name):
    memory = torch.randn(5, *SHAPE[1:], device=device)
    words = [rf"\b{result}\b", "shares memory"]
    refuse(step, ops, device, ValueError, words, **{name: memory[:4], result: memory[1:]})
    square = torch.randn(4, 3, 7, 7, device=device)
    changes = {n: square.clone() for n in (*read(step), *step.RESULTS)} | {name: square, result: square.mT}
    refuse(step, ops, device, ValueError, words, **changes)


@WRITTEN
def test_results_that_overlap(step, device, result):
    words = [rf"\b{result}\b", "share memory"]
    refuse(step, ops, device, ValueError, words, **{result: torch.randn(1, *SHAPE[1:], device=device).expand(SHAPE)})
    for other in set(step.RESULTS) - {result}:
        memory = torch.randn(SHAPE, device=device)
        refuse(step, ops, device, ValueError, [result, other, "shares memory"], **{result: memory, other: memory})


@WRITTEN
def test_results_in_what_all_elements_share(step, device, result):
    """A table or scales are still read when some of the result is written already."""
    memory = torch.randn(500, device=device)
    view = memory[:336].view(SHAPE)
    words = [rf"\b{result}\b", "shares memory"]
    refuse(step, ops, device, ValueError, words, **{result: view, "table": memory[256:336].view(5, 16)})
    for name in step.PER_SAMPLE:
        refuse(step, ops, device, ValueError, words, **{result: view, name: memory[332:336]})
    numbers = torch.zeros(336, dtype=torch.int64, device=device)
    view = numbers.view(F32)[:336].view(SHAPE)
    refuse(step, ops, device, ValueError, words, **{result: view, "t": numbers[:4]})
    ids = {"noise": ..., "rng": Philox(0, numbers[:4])}
    refuse(step, ops, device, ValueError, words, **{result: view, **ids})
    refuse(step, ops, device, ValueError, words, **{result: view, "noise": ..., "rng": Philox(numbers[7])})


@each(lambda step: (*read(step), *step.PER_SAMPLE, *step.RESULTS), "name")
def test_a_gradient_is_refused(step, device, name):
    given = arguments(step, device)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires a gradient.*expected none"):
        take(ops, step, **given)
    with torch.no_grad():
        assert not take(ops, step, **given | {"out": torch.empty(SHAPE, device=device)}).requires_grad


@STEPS
def test_a_forward_mode_derivative_is_refused(step, device):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ones(device=device), ones(device=device))
        name = step.LIKE_X[-1]
        with pytest.raises(NotImplementedError, match=f"{name} has a forward-mode derivative"):
            take(ops, step, **arguments(step, device, **{name: dual}))
