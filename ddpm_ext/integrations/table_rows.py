"""The rows of a step table as an integration takes them, one after another, in loops that another library runs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.step_table import StepTable

__all__ = ["TableRows"]


class TableRows:
    """A step table without c3, of which each row is one launch.

    Attributes:
        table: the step table.
        keeps: whether each row keeps a tensor for later ones.
    """

    def __init__(self, table: StepTable) -> None:
        self.table = table
        self._tables = StepDeviceTables(table)
        self._is_linear = table.linear
        self._reads = torch.stack([table.h1, table.h2, table.h3], 1).ne(0).tolist()
        self.keeps: list[bool] = ((table.k0 != 0) | (table.k1 != 0) | (table.k2 != 0)).tolist()

    def __len__(self) -> int:
        return len(self._reads)

    def take(
        self,
        ops: ModuleType,
        i: int,
        x: Tensor,
        m: Tensor,
        ring: tuple[Tensor, ...],
        *,
        clip: Clip | None = None,
        x0: Tensor | None = None,
        **noise: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Row i: the next sample, and what rows have kept after it, the newest first.

        Args:
            ops: the operators.
            x, m: the sample and the model's output.
            ring: what the rows before it have kept.
            clip: of the predicted clean sample.
            x0: where the predicted clean sample is written.
            noise: the operators' arguments for noise.
        """
        dtype = checks.compute_dtype(x.dtype)
        if not self._is_linear:
            if x0 is None:
                return ops.reverse_step(x, m, self._tables.get("steps", x.device, dtype), i, clip=clip, **noise), ring
            table = self._tables.get("extended", x.device, dtype)
            return ops.extended_step(x, m, table, i, clip=clip, x0_out=x0, **noise), ring
        history: dict[str, Any] = {
            f"history{1 + k}": ring[k].to(x.dtype) for k, is_read in enumerate(self._reads[i]) if is_read
        }
        kept = torch.empty_like(x) if self.keeps[i] else None
        table = self._tables.get("linear", x.device, dtype)
        prev = ops.linear_step(x, m, table, i, clip=clip, x0_out=x0, history_out=kept, **history, **noise)
        return prev, ring if kept is None else (kept, *ring[:2])
