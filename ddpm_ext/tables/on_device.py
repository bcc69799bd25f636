"""Tables on the devices where the kernels read them: step tables, packed, and other tables by name."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.checks import is_plain
from ddpm_ext.ops.cards import check_card, in_use
from ddpm_ext.ops.row import ROW
from ddpm_ext.tables.step_table import StepTable

VIEWED = 4  # batches of which the timesteps' views are kept


class DeviceTables:
    """Tables by name, in float32 and float64: made once on the CPU, and copied once to each other device."""

    def __init__(self, **tables: Tensor) -> None:
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        with torch.inference_mode(False):  # Inference tensors could not be saved for a backward pass later on.
            for dtype in (torch.float32, torch.float64):
                for name, table in tables.items():
                    self._tables[name, torch.device("cpu"), dtype] = table.to(dtype, copy=True).contiguous()

    def find(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """As get, but None where no table has that name."""
        return self.get(name, device, dtype) if (name, torch.device("cpu"), dtype) in self._tables else None

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table of that name. Raises KeyError where there is none."""
        table = self._tables.get((name, device, dtype))
        if table is None:
            check_card(device)
            with torch.inference_mode(False):
                table = self._tables[name, torch.device("cpu"), dtype].to(device)
            # A tensor that was made within a function transform or a fake mode is of no use after it.
            if is_plain(table):
                self._tables[name, device, dtype] = table
        if not table.is_cpu:
            in_use(self, self._tables, device)
        return table

    def __getstate__(self) -> dict[str, object]:
        """Only the tables on the CPU: the other devices may not be there when they are unpickled."""
        return {**self.__dict__, "_tables": {key: table for key, table in self._tables.items() if key[1].type == "cpu"}}


class KernelTables(DeviceTables):
    """A step table's rows, packed, beside other tables.

    "steps" are the rows, and "x0" rows whose next sample is the predicted clean sample.

    Args:
        steps: the step table.
        guidance: (rows,), scales of classifier-free guidance; None: ones.
        tables: the other tables, by name.
    """

    def __init__(self, steps: StepTable, guidance: Tensor | None = None, **tables: Tensor) -> None:
        super().__init__(**tables)
        self._views: BoundedCache[dict[int, Tensor]] = BoundedCache(VIEWED)
        cpu = torch.device("cpu")
        with torch.inference_mode(False):
            for dtype in (torch.float32, torch.float64):
                rows = self._tables["steps", cpu, dtype] = steps.packed(cpu, dtype, guidance)
                self._tables["x0", cpu, dtype] = _to_x0(rows)
            # What the model is called with: in float32 where timesteps lie between the schedule's own.
            fractional = steps.timestep.is_floating_point()
            self._timestep_dtype = torch.float32 if fractional else torch.int64
            timestep = steps.timestep.to(cpu, self._timestep_dtype, copy=True)
            self._tables["timesteps", cpu, self._timestep_dtype] = timestep

    def __len__(self) -> int:
        """How many rows the step table has."""
        return len(self.timesteps(torch.device("cpu")))

    def timesteps(self, device: torch.device) -> Tensor:
        """(rows,), int64, or float32 where timesteps lie between the schedule's own."""
        return self.get("timesteps", device, self._timestep_dtype)

    def timestep(self, row: int, batch: int, device: torch.device) -> Tensor:
        """The timestep of a row for each sample, (batch,), which is kept for the next call, unless somebody wrote to
        it."""
        if torch.compiler.is_compiling():
            return self._timestep(row, batch, device)
        views = self._views.get((batch, device)) or self._views.get_or_make((batch, device), dict)
        view = views.get(row)
        if view is None or view._version:
            with torch.inference_mode(False):
                view = self._timestep(row, batch, device)
            if is_plain(view):
                views[row] = view
        return view

    def _timestep(self, row: int, batch: int, device: torch.device) -> Tensor:
        timesteps = self.timesteps(device)
        if not 0 <= row < len(timesteps):  # only compiled calls come here without a check
            raise ValueError(f"t is {row}, expected 0 <= t < {len(timesteps)}")
        # Never views of the table, since a model could write to them.
        if torch.compiler.is_compiling():
            return timesteps[row].clone().expand(batch)
        key = "given timesteps", device, self._timestep_dtype
        given = self._tables.get(key)
        if given is None or given._version:
            given = self.timesteps(torch.device("cpu")).to(device, copy=True)
            if is_plain(given):
                self._tables[key] = given
        return given[row].expand(batch)


def _to_x0(rows: Tensor) -> Tensor:
    """Packed rows whose next sample is the predicted clean sample of `rows`."""
    found = torch.zeros_like(rows)
    found[:, ROW.index("c0")] = 1
    bits = torch.int32 if rows.dtype == torch.float32 else torch.int64  # of which the draw's are no number's
    for i in map(ROW.index, ("a", "b", "draw", "w", "c_in")):
        found.view(bits)[:, i] = rows.view(bits)[:, i]
    return found
