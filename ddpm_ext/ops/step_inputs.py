"""The list of the optional inputs and results of step_with_options that reverse_step does not have, for Python.

csrc/core/step_inputs.def is the same list for C++. A test compares this list with the signatures of
ops.step_with_options and of its twin in `reference`, and with the compiled operator's schema.
"""

from __future__ import annotations

from enum import Enum


class InputKind(Enum):
    """The shape and dtype of an optional input or result. "written" marks tensors that the operator writes to."""

    LIKE_X = "x_t's shape and dtype"
    OF_MODEL = "x_t's shape, the model output's dtype"
    PER_SAMPLE = "float32 (batch,)"
    RESULT = "written, x_t's shape and dtype"
    MODEL_INPUT = "written, x_t's shape, or that with twice the batch, any dtype"
    FLAG = "a bool"


# In the order of the compiled operator's arguments.
STEP_INPUTS: dict[str, InputKind] = {
    "uncond_output": InputKind.OF_MODEL,
    "output_scale": InputKind.PER_SAMPLE,
    "model_variance": InputKind.OF_MODEL,
    "log_variance": InputKind.FLAG,
    "x_start": InputKind.LIKE_X,
    "x_start_scale": InputKind.PER_SAMPLE,
    "history1": InputKind.LIKE_X,
    "history2": InputKind.LIKE_X,
    "history3": InputKind.LIKE_X,
    "gradient": InputKind.LIKE_X,
    "known": InputKind.LIKE_X,
    "mask": InputKind.LIKE_X,
    "model_input": InputKind.MODEL_INPUT,
    "x0_out": InputKind.RESULT,
    "history_out": InputKind.RESULT,
}

DEFAULTS = {name: True if kind is InputKind.FLAG else None for name, kind in STEP_INPUTS.items()}


def names(*kinds: InputKind) -> tuple[str, ...]:
    """The inputs of these kinds, in the operator's order."""
    return tuple(name for name, kind in STEP_INPUTS.items() if kind in kinds)
