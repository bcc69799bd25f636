"""The kinds of a step's optional inputs and results: see extended_inputs.py and linear_inputs.py."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

__all__ = ["Kind", "names"]


class Kind(Enum):
    """What a tensor must be like."""

    LIKE_X = "x_t's shape and dtype"
    OF_MODEL = "x_t's shape, the model output's dtype"
    PER_SAMPLE = "float32 (batch,)"
    RESULT = "written, x_t's shape and dtype"
    FLAG = "a bool"


def names(inputs: Mapping[str, Kind], *kinds: Kind) -> tuple[str, ...]:
    """The inputs of these kinds, in the operator's order."""
    return tuple(name for name, kind in inputs.items() if kind in kinds)
