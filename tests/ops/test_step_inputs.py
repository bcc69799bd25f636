"""A row's numbers and the inputs of a step with options are declared once for each language: the lists agree, and the
signatures and the compiled operator's schema follow them."""

from __future__ import annotations

import inspect

import pytest
import torch

from ddpm_ext import StepTable, ops, reference
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.row import ROW, WIDTH, row_numbers
from ddpm_ext.ops.step_inputs import STEP_INPUTS, InputKind

PLAIN = ["x_t", "model_output", "table", "t", "clip", "noise", "rng", "add_noise", "out"]


def test_the_rows_numbers_are_one_list():
    assert list(ROW) == list(C.row_names()) and len(set(ROW)) == len(ROW) <= WIDTH
    numbers = {name: [i + 1] for i, name in enumerate(ROW) if name not in ("w", "c_in")}
    packed = StepTable([0], **numbers).packed("cpu", guidance=[ROW.index("w") + 1.0])
    assert packed.shape == (1, WIDTH) and not packed[0, len(ROW) :].any()
    draw = packed.view(torch.int32)[0, ROW.index("draw")].item()
    packed[0, ROW.index("draw")] = draw
    assert ROW[-1] == "c_in" and packed[0, : len(ROW)].tolist() == [*range(1, len(ROW)), 1]


def test_the_reference_takes_numbers_by_their_names():
    values = torch.randn(5, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    table, x = StepTable(range(2), *values, draw=[2**32 - 1, 7], k1=[3.0, 4.0]), torch.zeros(3, 2, 5)
    for dtype in (torch.float32, torch.float64):
        row = row_numbers(table.packed("cpu", dtype), torch.tensor([9, -1, 1]), x, torch.float64)
        assert row._fields == ROW and row.draw.tolist() == [7, 2**32 - 1, 7]
        assert row.k1.shape == (3, 1, 1) and row.k1.dtype == torch.float64 and row.k1.flatten().tolist() == [4, 3, 4]


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
        written = kind in (InputKind.RESULT, InputKind.MODEL_INPUT)
        assert (argument.alias_info is not None and argument.alias_info.is_write) == written
