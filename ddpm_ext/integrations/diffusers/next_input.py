"""What a scheduler's scale_model_input multiplies samples by, so that a step writes the model's next input as well."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_rows import TracedRows
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.shared import new
from ddpm_ext.integrations.tensors import DTYPES

PROBE = (1.0, -3.0, 0.0, 0.1)
EXACT = 1e-12  # how far scale_model_input may be from a factor, relatively


class InputScales(NamedTuple):
    """Of a loop's rows.

    Attributes:
        stepper: takes the rows, and also writes the model's next input where it is given `model_input`.
        factors: for each row but the first, of the samples before it; a float32 number.
        changes: for each row, the attributes that scale_model_input sets before it.
    """

    stepper: RowStepper
    factors: list[float]
    changes: list[dict[str, Any]]

    @staticmethod
    def take(*args: Any) -> bool:
        """Whether these arguments of scale_model_input are a sample of a dtype for which the factors are exact enough,
        and a timestep."""
        return len(args) == 2 and type(args[0]) is Tensor and args[0].dtype in DTYPES


def scales_of(rows: TracedRows) -> InputScales | None:
    """The factor of each row, found by the class's own scale_model_input of numbers of which one is 0. None where it
    does anything else with a sample than to multiply it."""
    stepper = rows.stepper
    if stepper.scales is None:
        stepper.scales = _scales(rows) or False
    return stepper.scales or None


def _scales(rows: TracedRows) -> InputScales | None:
    probe = new(type(rows.scheduler))
    probe.__dict__.update(vars(rows.scheduler))
    changes: list[dict[str, Any]] = [{}]
    found = []
    with torch.inference_mode(False), torch.no_grad():
        numbers = torch.tensor(PROBE, dtype=torch.float64, device="cpu")
        x = numbers.reshape(-1, *[1] * (rows.key.dims - 1)).clone()
        own = vars(probe)
        for step, timestep in zip(rows.trace.steps, rows.timesteps[1:], strict=False):
            own.update(step.state)
            own.update(dict.fromkeys(step.tensors, x))
            before = own.copy()
            try:
                scaled = probe.scale_model_input(x, timestep)
            except Exception:  # it takes no such samples
                return None
            changed = {name: value for name, value in own.items() if before.get(name, before) is not value}
            if not isinstance(scaled, Tensor) or (scaled.dtype, scaled.shape) != (x.dtype, x.shape):
                return None
            if not all(value is None or isinstance(value, bool | int | float | str) for value in changed.values()):
                return None
            changes.append(changed)
            found.append(scaled)
        results = torch.stack(found).flatten(1)
        factors = results[:, 0]
        exact = torch.allclose(results, factors[:, None] * numbers, rtol=EXACT, atol=0)
        if not exact or not torch.equal(x.flatten(), numbers):
            return None
        c_in = torch.cat([factors, torch.ones_like(factors[:1])]).float()
        return InputScales(rows.stepper.for_inputs(c_in), [1.0, *c_in[:-1].tolist()], changes)
