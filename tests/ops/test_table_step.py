"""ops.TableStep and its twin in `reference`: the operators' bits, each in its launches, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.choices import Choose, for_many
from support.devices import moved
from support.rounding import same_bits
from support.step_inputs import LIKE_X, OF_MODEL, PER_SAMPLE, RESULTS, make_table, options
from torch.profiler import ProfilerActivity, profile

from ddpm_ext import Philox, ops
from ddpm_ext.ops import reference

F32, F16 = torch.float32, torch.float16
SHAPE = (4, 3, 5, 7)
TABLE = make_table(6)
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
INPUTS = (*LIKE_X, *OF_MODEL, *PER_SAMPLE)


@pytest.fixture(scope="session")
def tensors(device):
    """All inputs of a step: x_t, model_output, a noise, and those of step_with_options."""

    def make(dtype=F32, model_dtype=F32):
        x, m, z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind()
        given = {"x_t": x.to(dtype), "model_output": m.to(model_dtype), "noise": z.to(dtype)}
        return moved(given | options(SHAPE, dtype, model_dtype), device)

    return make


def launches(function):
    """The operators of this package that it runs on the CPU, in their order."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name.partition("::")[2] for event in profiler.events() if event.name.startswith("ddpm_ext::")]


# ----------------------------------------------------------------------------------------------- the operators' bits


@BACKENDS
@for_many(60)
def test_keywords_are_the_operators_inputs(device, tensors, backend, choose: Choose):
    """None counts as not given; noise may be given for one call; results are written where they are given."""
    given = tensors(F16 if choose.one_of([False, True], "16 bits") else F32, choose.one_of([F16], "model's"))
    x, m, z = (given.pop(name) for name in ("x_t", "model_output", "noise"))
    inputs = {name: given[name] if choose.one_of([False, True], name) else None for name in INPUTS}
    if (inputs["known"] is None) != (inputs["mask"] is None):
        inputs["known"] = inputs["mask"] = None
    m = None if inputs["uncond_output"] is None and choose.one_of([False, True], "no output") else m
    if choose.one_of([False, True], "direct variance"):
        inputs["log_variance"] = False
    source = choose.one_of([{"noise": z}, {"rng": Philox(3, 2**40)}, {"add_noise": False}, {}], "source")
    own = {"noise": z} if choose.one_of([False, True], "own noise") and not {"rng", "noise"} & set(source) else {}
    table, clip = TABLE.to(device), choose.one_of([None, (-1.0, 1.0), (-0.5, 0.25)], "clip")
    row, index = choose.one_of([(None, 3), (torch.tensor([3, 0, 5, 1], device=device), 0)], "row")
    chosen = [name for name in RESULTS if choose.one_of([False, True], name)]
    found, expected = ({name: torch.empty_like(x) for name in chosen} for _ in range(2))

    step = backend.TableStep(table, clip=clip, **source)
    torch.manual_seed(5)
    got = step.take(x, m, row, index, found.pop("out", None), **inputs, **found, **own)
    how = {name: value for name, value in inputs.items() if value is not None} | source | own
    torch.manual_seed(5)
    t = index if row is None else row
    wanted = backend.step_with_options(x, m, table, t, clip=clip, **how, **expected)
    assert same_bits(got, wanted)
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert "out" not in chosen or got.data_ptr() != wanted.data_ptr()


@BACKENDS
def test_scales_are_computed_on_the_way(device, tensors, backend):
    """quantile and maximum stand for an x_start_scale, guidance and rescale for an output_scale."""
    given, table = tensors(), TABLE.to(device)
    x, m, u, x_start = (given[name] for name in ("x_t", "model_output", "uncond_output", "x_start"))
    step = backend.TableStep(table, clip=(-1.0, 1.0), rng=Philox(2))

    def take(**inputs):
        return backend.step_with_options(3 * x, m, table, 2, rng=Philox(2), **inputs)

    scale = backend.output_scale(m, u, guidance=2.5, rescale=0.7)
    got = step.take(3 * x, m, None, 2, uncond_output=u, guidance=2.5, rescale=0.7)
    assert torch.equal(got, take(uncond_output=u, output_scale=scale))
    for maximum in ({}, {"maximum": 1.25}):
        bound = {"quantile": 0.8, **maximum}
        got = step.take(3 * x, m, None, 2, **bound)
        assert torch.equal(got, take(x_start_scale=backend.x_start_scale(3 * x, m, table, 2, **bound)))
        got = step.take(3 * x, m, None, 2, x_start=3 * x_start, **bound)
        assert torch.equal(got, take(x_start=3 * x_start, x_start_scale=backend.x_start_scale(3 * x_start, **bound)))
    both = backend.x_start_scale(3 * x, m, table, 2, quantile=0.8, uncond_output=u, output_scale=scale)
    got = step.take(3 * x, m, None, 2, uncond_output=u, guidance=2.5, rescale=0.7, quantile=0.8)
    assert torch.equal(got, take(uncond_output=u, output_scale=scale, x_start_scale=both))


def test_a_copy_on_the_host_may_begin_at_any_number(device, tensors):
    given, table = tensors(), TABLE.to(device)
    x, m = given["x_t"], given["model_output"]
    expected = ops.reverse_step(x, m, table, 2, add_noise=False)
    for first in range(1, 4):
        on_host = torch.cat([torch.zeros(first), TABLE.flatten()])[first:].view_as(TABLE)
        assert torch.equal(ops.TableStep(table, on_host=on_host, add_noise=False).take(x, m, None, 2), expected)


def test_each_call_takes_the_launches_of_its_inputs(device, tensors):
    """A call without options takes the plain kernel, also where the operator is called by its name."""
    given = tensors()
    x, m, z = (given.pop(name) for name in ("x_t", "model_output", "noise"))
    step = ops.TableStep(TABLE.to(device), add_noise=False)
    plain, with_options = ["reverse_step"], ["step_with_options"]
    for inputs, expected in (
        ({}, plain),
        ({"noise": z}, plain),
        ({"history1": None}, plain),
        ({"x0_out": torch.empty_like(x)}, with_options),
        (given, with_options),
        ({"uncond_output": m, "guidance": 2.0, "rescale": 0.5}, ["output_scale", *with_options]),
        ({"quantile": 0.9}, ["x_start_scale", *with_options]),
    ):
        assert launches(lambda inputs=inputs: step.take(x, m, None, 1, **inputs)) == expected, list(inputs)
    assert launches(lambda: step.take(x, None, None, 1)) == with_options  # a row that asks no model
    assert step.take(x, m, None, 1, out := torch.empty_like(x)) is out


def test_gradients_are_recorded_by_the_plain_step_alone(device, tensors):
    given, table = tensors(), TABLE.to(device)
    x, m, z = given["x_t"].requires_grad_(), given["model_output"], given["noise"]
    for backend in (ops, reference):
        step = backend.TableStep(table, add_noise=False)
        (slope,) = torch.autograd.grad(step.take(x, m, None, 1, noise=z).sum(), x)
        (expected,) = torch.autograd.grad(backend.reverse_step(x, m, table, 1, noise=z).sum(), x)
        assert torch.equal(slope, expected)
    with pytest.raises(ValueError, match=r"step_with_options: x_t requires a gradient, but it records no gradients"):
        ops.TableStep(table).take(x, m, None, 1, history1=z)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"histories": torch.zeros(SHAPE)}, "unknown input histories, expected one of noise, uncond_output, "),
        ({"history4": None}, "unknown input history4"),
        ({"history1": [0.0]}, "history1 is a list, expected a tensor"),
        ({"output_scale": 2.0}, "output_scale is a float, expected a tensor"),
        ({"noise": 1}, "noise is a int, expected a tensor"),
        ({"log_variance": "yes"}, "log_variance is 'yes', expected a bool"),
        ({"quantile": "0.9"}, "quantile is '0.9', expected a number"),
    ],
)
def test_wrong_keywords(device, tensors, inputs, message):
    given = tensors()
    with pytest.raises(TypeError, match=message):
        ops.TableStep(TABLE.to(device)).take(given["x_t"], given["model_output"], None, 1, **inputs)


@BACKENDS
def test_inputs_are_checked_as_the_operators(device, tensors, backend):
    given = tensors()
    x, m, z = given["x_t"], given["model_output"], given["noise"]
    step = backend.TableStep(TABLE.to(device), rng=Philox(1))
    for call, message in (
        (lambda: step.take(x, m, None, 1, history2=z[:2]), "history2 has shape"),
        (lambda: step.take(x, m, None, 1, mask=z), "mask is given without known"),
        (lambda: step.take(x, m, None, 1, noise=z), "noise and rng are both given|noise is given"),
        (lambda: step.take(x, m, None, 1, guidance=2.0), "guidance is given without uncond_output"),
        (lambda: step.take(x, None, None, 1, rescale=0.5), "rescale is given without model_output"),
        (lambda: step.take(x, m, None, 1, quantile=2.0), "quantile is 2"),
        (lambda: ops.TableStep(TABLE).take(x.cpu(), m.cpu(), None, 1, maximum=2.0), "quantile is 0"),
        (
            lambda: ops.TableStep(TABLE, on_host=TABLE[1:]).take(x.cpu(), m.cpu(), None, 1),
            r"on_host is Float \[5, 24\] on cpu, expected .* \[6, 24\]",
        ),
        (lambda: step.check(x, None, 6), "t is 6, expected 0 <= t < 6"),
        (lambda: step.check(x, None, 1, z[:2]), "out has shape"),
        (lambda: backend.TableStep(TABLE, clip=(1.0, -1.0)).take(x.cpu(), m.cpu(), None, 1), "expected low <= high"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="table is a list"):
        backend.TableStep([1.0])
