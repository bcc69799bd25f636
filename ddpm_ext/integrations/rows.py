"""The rows of a table, each taken in one launch: what schedulers, samplers and traced loops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops import reference
from ddpm_ext.ops.fused import TableStep
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.row_needs import row_needs
from ddpm_ext.tables.step_table import StepTable

HISTORY = ("history1", "history2", "history3")


class Rows:
    """The rows of a step table.

    Args:
        table: the numbers.
        clip: the range that predicted clean samples are clipped to.
        threshold: what they are divided by before.
        held: for each row, whether somebody holds the model's output anyway, so that a row that keeps it need not write
            it; None: all.

    Attributes:
        table, clip, threshold: the arguments.
        needs: what each row needs.
    """

    def __init__(
        self,
        table: StepTable,
        clip: Clip | None = None,
        threshold: DynamicThreshold | None = None,
        held: Sequence[bool] | None = None,
    ) -> None:
        self.table, self.clip, self.threshold = table, clip, threshold
        self.needs = row_needs(table)
        self._tables = KernelTables(table)
        self._quiet_steps: dict[torch.device, TableStep] = {}
        self._linear = table.linear
        self._reads = [[k for k, is_read in enumerate(kind.history) if is_read] for kind in self.needs]
        self._keeps_output = [
            kind.keeps_output and clip is None and (held is None or held[i]) for i, kind in enumerate(self.needs)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Without steps for devices that may not be there when they are unpickled."""
        return {**self.__dict__, "_quiet_steps": {}}

    def quiet_step(self, device: torch.device) -> TableStep | None:
        """Takes rows without noise for float32 arithmetic on a device, as take does, with less of Python. None where
        rows need more than the plain step."""
        if self._linear or self.threshold is not None:
            return None
        step = self._quiet_steps.get(device)
        if step is None:
            table = self._tables.get("steps", device, torch.float32)
            step = self._quiet_steps[device] = TableStep(table, clip=self.clip, add_noise=False)
        return step

    def take(
        self,
        i: int,
        x: Tensor,
        m: Tensor,
        history: Sequence[Tensor] = (),
        *,
        x0: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Row i in one launch: the next sample, and what the row keeps. A threshold takes two.

        The compiled operators take the dtypes and devices that they know, and plain torch all others.

        Args:
            history: what earlier rows kept, the newest first.
            x0: is filled with the predicted clean sample.
            inputs: further ones of the operators, such as noise.
        """
        device, dtype = x.device, x.dtype
        known = dtype is not torch.float64 and (x.is_cpu or x.is_cuda)
        operators, dtype = ops if known else reference, checks.compute_dtype(dtype)
        if self.threshold is not None:
            to_x0 = self._tables.get("x0", device, dtype)
            bound = {"quantile": self.threshold.quantile, "maximum": self.threshold.maximum}
            inputs["x_start_scale"] = operators.x_start_scale(x, m, to_x0, i, **bound)
        if not self._linear:
            if x0 is None and self.threshold is None:
                table = self._tables.get("steps", device, dtype)
                return operators.reverse_step(x, m, table, i, clip=self.clip, **inputs), None
            table = self._tables.get("steps", device, dtype)
            return operators.step_with_options(x, m, table, i, clip=self.clip, x0_out=x0, **inputs), None
        for k in self._reads[i]:
            read = history[k]
            inputs[HISTORY[k]] = read if read.dtype is x.dtype else read.to(x.dtype)
        keeps, kept = self.needs[i].keeps, None
        if keeps:
            kept = m if self._keeps_output[i] and m.dtype is x.dtype else empty_like(x)
        out = None if kept is m else kept
        table = self._tables.get("steps", device, dtype)
        prev = operators.step_with_options(x, m, table, i, clip=self.clip, x0_out=x0, history_out=out, **inputs)
        return prev, kept
