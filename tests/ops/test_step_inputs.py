"""The inputs of the extended and of the linear step are declared once: the signatures and the compiled operators'
schemas follow the lists."""

from __future__ import annotations

import inspect

import pytest
import torch
from support import extended, linear

from ddpm_ext import ops, reference
from ddpm_ext.ops.input_kinds import Kind, names

PLAIN = ["x_t", "model_output", "table", "t", "clip", "noise", "rng", "add_noise", "out"]
STEPS = pytest.mark.parametrize("step", [extended, linear], ids=lambda step: step.OPERATOR)


@STEPS
@pytest.mark.parametrize("module", [ops, reference], ids=["fused", "reference"])
def test_signatures(module, step):
    parameters = inspect.signature(getattr(module, step.OPERATOR)).parameters
    declared = [name for name in parameters if name not in PLAIN]
    assert declared == list(step.INPUTS)
    assert [name for name in parameters if name in PLAIN] == PLAIN
    for name, kind in step.INPUTS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is (True if kind is Kind.FLAG else None), name


@STEPS
def test_schema(step):
    arguments = getattr(torch.ops.ddpm_ext, step.OPERATOR).default._schema.arguments
    at = [argument.name for argument in arguments].index("out")
    assert arguments[at].alias_info.is_write
    assert [argument.name for argument in arguments[at + 1 :]] == list(step.INPUTS)
    for argument in arguments[at + 1 :]:
        kind = step.INPUTS[argument.name]
        assert str(argument.type) == ("bool" if kind is Kind.FLAG else "Optional[Tensor]")
        assert (argument.alias_info is not None and argument.alias_info.is_write) == (kind is Kind.RESULT)


@STEPS
def test_every_kind_is_listed(step):
    assert sorted(names(step.INPUTS, *Kind)) == sorted(step.INPUTS)
    kinds = [kind for kind in Kind if kind is not Kind.FLAG or step is extended]
    assert all(names(step.INPUTS, kind) for kind in kinds)
