"""ops.TableStep and its twin in `reference`: the operators' bits, each in its launches, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.choices import Choose, for_many
from support.devices import moved
from support.rounding import same_bits
from support.step_inputs import LIKE_X, OF_MODEL, PER_SAMPLE, RESULTS, make_table, options

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


def test_a_copy_on_the_host_may_begin_at_any_number(device, tensors):
    given, table = tensors(), TABLE.to(device)
    x, m = given["x_t"], given["model_output"]
    expected = ops.reverse_step(x, m, table, 2, add_noise=False)
    for first in range(1, 4):
        on_host = torch.cat([torch.zeros(first), TABLE.flatten()])[first:].view_as(TABLE)
        assert torch.equal(ops.TableStep(table, on_host=on_host, add_noise=False).take(x, m, None, 2), expected)


# --------------------------------------------------------------------------------------------------------- refusals
