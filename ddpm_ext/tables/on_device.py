"""Coefficients of the reverse and the forward process: float64 on the host, packed for the kernels on the device.

Every sampler and every parameterisation is a way to fill rows of one table:

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample

with x the sample at a timestep, m the model's output, z a standard normal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base.checks import is_plain
from ddpm_ext.tables.step_table import StepTable

__all__ = ["DeviceTables", "StepDeviceTables"]


class DeviceTables:
    """Tables by name, in float32 and float64, made once on the CPU and copied once to each other device."""

    def __init__(self, **tables: Tensor) -> None:
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        with torch.inference_mode(False):  # inference tensors could not be saved for a backward pass later on
            for dtype in (torch.float32, torch.float64):
                for name, table in tables.items():
                    self._tables[name, torch.device("cpu"), dtype] = table.to(dtype, copy=True).contiguous()

    def find(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """As get; None where there is none of that name."""
        return self.get(name, device, dtype) if (name, torch.device("cpu"), dtype) in self._tables else None

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        table = self._tables.get((name, device, dtype))
        if table is None:
            with torch.inference_mode(False):
                table = self._tables[name, torch.device("cpu"), dtype].to(device)
            # What a function transform or a fake mode made is of no use after it.
            if is_plain(table):
                self._tables[name, device, dtype] = table
        return table

    def __getstate__(self) -> dict[str, object]:
        """Without the copies: they are made anew where they are unpickled."""
        return {**self.__dict__, "_tables": {key: table for key, table in self._tables.items() if key[1].type == "cpu"}}


class StepDeviceTables(DeviceTables):
    """With a step table's rows for the two kernels, "steps" and "extended", and "x0", rows that end at the predicted
    clean sample. `guidance`: the rows' scales of classifier-free guidance.
    """

    def __init__(self, steps: StepTable, guidance: Tensor | None = None, **tables: Tensor) -> None:
        super().__init__(**tables)
        cpu = torch.device("cpu")
        zeros = torch.zeros_like(steps.a)
        x0 = StepTable(steps.timestep, steps.a, steps.b, torch.ones_like(zeros), zeros, draw=steps.draw)
        with torch.inference_mode(False):
            for dtype in (torch.float32, torch.float64):
                self._tables["steps", cpu, dtype] = steps.packed(cpu, dtype)
                self._tables["extended", cpu, dtype] = steps.packed_extended(cpu, dtype, guidance)
                self._tables["x0", cpu, dtype] = x0.packed_extended(cpu, dtype, guidance)
            # what the model is told: between a schedule's timesteps in float32
            fractional = steps.timestep.is_floating_point()
            self._timestep_dtype = torch.float32 if fractional else torch.int64
            self._tables["timesteps", cpu, self._timestep_dtype] = steps.timestep.to(
                cpu, self._timestep_dtype, copy=True
            )

    def __len__(self) -> int:
        """Steps."""
        return len(self.timesteps(torch.device("cpu")))

    def timesteps(self, device: torch.device) -> Tensor:
        """(rows,), int64, or float32 where they lie between the schedule's own."""
        return self.get("timesteps", device, self._timestep_dtype)
