"""The extended step's inputs are declared once: the signatures and the compiled operator's schema follow the list."""

from __future__ import annotations

import inspect

import pytest
import torch

from ddpm_ext import ops, reference
from ddpm_ext.ops.extended_inputs import EXTENDED_INPUTS
from ddpm_ext.ops.input_kinds import Kind, names

PLAIN = ["x_t", "model_output", "table", "t", "clip", "noise", "rng", "add_noise", "out"]


@pytest.mark.parametrize("module", [ops, reference], ids=["fused", "reference"])
def test_signatures(module):
    parameters = inspect.signature(module.extended_step).parameters
    declared = [name for name in parameters if name not in PLAIN]
    assert declared == list(EXTENDED_INPUTS)
    assert [name for name in parameters if name in PLAIN] == PLAIN
    for name, kind in EXTENDED_INPUTS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is (True if kind is Kind.FLAG else None), name


def test_schema():
    arguments = torch.ops.ddpm_ext.extended_step.default._schema.arguments
    at = [argument.name for argument in arguments].index("out")
    assert arguments[at].alias_info.is_write
    assert [argument.name for argument in arguments[at + 1 :]] == list(EXTENDED_INPUTS)
    for argument in arguments[at + 1 :]:
        kind = EXTENDED_INPUTS[argument.name]
        assert str(argument.type) == ("bool" if kind is Kind.FLAG else "Optional[Tensor]")
        assert (argument.alias_info is not None and argument.alias_info.is_write) == (kind is Kind.RESULT)


def test_every_kind_is_listed():
    assert sorted(names(EXTENDED_INPUTS, *Kind)) == sorted(EXTENDED_INPUTS)
    assert all(names(EXTENDED_INPUTS, kind) for kind in Kind)
