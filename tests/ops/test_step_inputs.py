"""A row's numbers and the inputs of a step with options are declared once for each language: the lists agree, and the
signatures and the compiled operator's schema follow them."""

from __future__ import annotations

import inspect

import pytest
import torch

from ddpm_ext import StepTable, ops, reference
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.ops.step_inputs import STEP_INPUTS, InputKind, names

PLAIN = ["x_t", "model_output", "table", "t", "clip", "noise", "rng", "add_noise", "out"]


def test_the_rows_numbers_are_one_list():
    assert list(ROW) == list(C.row_names()) and len(set(ROW)) == len(ROW) <= WIDTH
    numbers = {name: [i + 1] for i, name in enumerate(ROW) if name != "w"}
    packed = StepTable([0], **numbers).packed("cpu", guidance=[ROW.index("w") + 1.0])
    assert packed.shape == (1, WIDTH) and not packed[0, len(ROW) :].any()
    draw = packed.view(torch.int32)[0, ROW.index("draw")].item()
    packed[0, ROW.index("draw")] = draw
    assert packed[0, : len(ROW)].tolist() == list(range(1, len(ROW) + 1))


@pytest.mark.parametrize("module", [ops, reference], ids=["fused", "reference"])
def test_signatures(module):
    parameters = inspect.signature(module.step_with_options).parameters
    assert [name for name in parameters if name not in PLAIN] == list(STEP_INPUTS)
    assert [name for name in parameters if name in PLAIN] == PLAIN
    for name, kind in STEP_INPUTS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is (True if kind is InputKind.FLAG else None), name


def test_schema():
    arguments = torch.ops.ddpm_ext.step_with_options.default._schema.arguments
    at = [argument.name for argument in arguments].index("out")
    assert arguments[at].alias_info.is_write
    assert [argument.name for argument in arguments[at + 1 :]] == list(STEP_INPUTS)
    for argument in arguments[at + 1 :]:
        kind = STEP_INPUTS[argument.name]
        assert str(argument.type) == ("bool" if kind is InputKind.FLAG else "Optional[Tensor]")
        assert (argument.alias_info is not None and argument.alias_info.is_write) == (kind is InputKind.RESULT)


def test_every_kind_is_listed():
    assert sorted(names(*InputKind)) == sorted(STEP_INPUTS)
    assert all(names(kind) for kind in InputKind)
