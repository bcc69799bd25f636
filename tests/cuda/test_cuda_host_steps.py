"""The CUDA kernels of the step with options on the stand-in for CUDA's runtime, option by option and set by set: see
test_cuda_host.py for what they share with the other operators' kernels."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.cuda_host.calls import OPTIONS, PAIRS, ROWS, SPECIAL, STEP, Call, make_call
from support.step_inputs import LIKE_X, OF_MODEL, PER_SAMPLE, RESULTS, make_row

from benchmarks.static.kernels import option_sets

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")
NOISES = ("none", "given", "drawn")
OWN = {"x_t", "model_output", "out"}
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))

# None, each, all. Known without mask would be refused.
CHOICES = [(), *((name,) for name in OPTIONS if name not in ("known", "mask")), ("known", "mask"), OPTIONS]


def call_of(shape, pair, chosen, noise, **how):
    """A call with those tensors and factors, and no more than it must have besides."""
    options = [option for option in OPTIONS if option in chosen]
    results = tuple(result for result in RESULTS if result in chosen or result == "out")
    return make_call((STEP, noise, pair), *shape, options=options, results=results, **how)


@pairs
def test_options_one_by_one(host, pair):
    """Of each set nothing is read that isn't in it: the memory would not be there."""
    for options, noise, places in itertools.product(CHOICES, NOISES, ("front", "odd", "back")):
        for log_variance in (True, False) if "model_variance" in options else (True,):
            how = {"options": options, "log_variance": log_variance}
            host.check(make_call((STEP, noise, pair), 3, 77, **how), places)
            host.check(make_call((STEP, noise, pair), 3, 72, **how, results=("out",)), places)
    for options in (("x_start", "history3"), ("history3",)):
        host.check(make_call((STEP, "drawn", pair), 3, 72, options=options, without=("model_output",)))


@pairs
def test_sets_of_options_that_have_a_kernel(host, pair):
    """With all that a call of each may have, without each one, and with one more; aligned and off alignment."""
    everything = {*OPTIONS, *RESULTS, "noise"} - {*OWN, "known", "mask"}
    for members in option_sets().values():
        may = members - OWN
        for chosen in (may, *(may - {one} for one in may), *(may | {one} for one in everything - may)):
            for noise in ("given",) if "noise" in chosen else ("none", "drawn"):
                call = call_of((3, 72), pair, chosen, noise)
                expected = call.on_cpu()
                host.check(call, expected=expected)
                host.check(call, "odd", expected=expected)


@pytest.mark.parametrize("size", [256, 77])
@pairs
def test_in_place(host, pair, size):
    """Each result in the place of each argument."""
    call = make_call((STEP, "given", pair), 3, size)
    expected = call.on_cpu()
    for result, name in itertools.product(RESULTS, call.read):
        if call.tensors[name].dtype == pair[0]:
            host.check(call, expected=expected, instead={result: name})
    host.check(call, expected=expected, instead={"out": "x_t", "history_out": "history3", "model_input": "noise"})


@pairs
def test_the_models_next_input(host, pair):
    """In every dtype, alone and for both halves of a doubled batch; by vectors, by words and element by element."""
    for chosen in (option_sets()["NextInput"], option_sets()["Guided"], {*OPTIONS, *RESULTS}):
        for kind in itertools.product((torch.float32, torch.float16, torch.bfloat16), (1, 2)):
            for size in (72, 77):
                call = call_of((3, size), pair, chosen, "given" if "noise" in chosen else "drawn", input_kind=kind)
                host.check(call)
                host.check(call, "odd")


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[3]])
def test_scales_by_strides(host, pair):
    call = make_call((STEP, "drawn", pair), 5, 40)
    expected = call.on_cpu()
    apart = {name: torch.stack([call.tensors[name]] * 3, 1)[:, 1] for name in PER_SAMPLE}
    for scales in (apart, {name: apart[name] for name in PER_SAMPLE[:1]}):
        for places in ("odd", "front"):
            host.check(replace(call, tensors={**call.tensors, **scales}), places, expected=expected)
            assert host.control.took_vectors() == (places == "front")


def test_special_values(host):
    """In every place of every row, and clips with zeros."""
    x, m, v = torch.tensor(list(itertools.product(SPECIAL, repeat=3))).T.contiguous().unsqueeze(1)
    others = {name: (x, m, v)[i % 3].roll(i, 1) for i, name in enumerate((*LIKE_X, *OF_MODEL)) if name != "x_start"}
    given_sets = [{}, others, {"x_start": v, "noise": m}, {"model_variance": v}, {"noise": m, "history1": v}]
    for row, clip, log_variance, given in itertools.product(
        range(len(ROWS)), [(-1.0, 1.0), (-math.inf, math.inf), (-0.0, 0.0)], (True, False), given_sets
    ):
        how = {"t_index": row, "clip": clip, "log_variance": log_variance, "drawn": "noise" not in given}
        host.check(Call(STEP, {"x_t": x, "model_output": m, **given}, ROWS, RESULTS, **how))


@pytest.mark.parametrize("choice", range(4), ids=["nearest", "least", "greatest", "any"])
def test_an_inexact_instruction_leaves_no_trace(host, choice):
    """Whatever a GPU's reciprocal square root returns, variances all the way have the same roots."""
    host.control.set_rsqrt(choice)
    mantissas = torch.arange(0, 2**23, 211, dtype=torch.int32)
    exponents = torch.arange(len(mantissas), dtype=torch.int32) % 202 + 26
    v = (mantissas + (exponents << 23)).view(torch.float32).view(1, -1)
    for log_variance, variances in ((False, v), (True, torch.linspace(-100, 100, 40_001).view(1, -1))):
        tensors = {"x_t": torch.zeros_like(variances), "noise": torch.ones_like(variances), "model_variance": variances}
        host.check(Call(STEP, tensors, make_row(s=1.0, l1=1.0), log_variance=log_variance))
