"""What a scheduler's scale_model_input multiplies samples by, so that a step writes the model's next input as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_rows import TracedRows
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.tensors import DTYPES
from ddpm_ext.tables.trace_watch import CONSTANT


class InputScales(NamedTuple):
    """Of a loop's rows.

    Attributes:
        stepper: takes the rows, and also writes the model's next input where it is given `model_input`.
        factors: for each row but the first, of the samples before it; a float32 number.
        changes: for each row, the attributes that scale_model_input sets before it.
    """

    stepper: RowStepper
    factors: list[float]
    changes: list[Mapping[str, Any]]

    @staticmethod
    def take(*args: Any) -> bool:
        """Whether these arguments of scale_model_input are a sample of a dtype for which the factors are exact enough,
        and a timestep."""
        return len(args) == 2 and type(args[0]) is Tensor and args[0].dtype in DTYPES


def scales_of(rows: TracedRows) -> InputScales | None:
    """Those that tracing found. None where scale_model_input does anything else with a sample than to multiply it."""
    stepper = rows.stepper
    if stepper.scales is None:
        stepper.scales = _scales(rows) or False
    return stepper.scales or None


def _scales(rows: TracedRows) -> InputScales | None:
    scales, changes = rows.trace.scales, [step.scaling for step in rows.trace.steps[1:]]
    if scales is None or not all(type(value) in CONSTANT for each in changes for value in each.values()):
        return None
    factors = scales.astype(np.float32)  # what a step multiplies its result by is the next one's
    c_in = torch.from_numpy(np.append(factors[1:], np.float32(1)))
    return InputScales(rows.stepper.for_inputs(c_in), factors.tolist(), [{}, *changes])
