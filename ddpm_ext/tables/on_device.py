"""DeviceTables and KernelTables: copies of tables on the devices whose kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.checks import is_plain
from ddpm_ext.ops.cards import check_card, in_use
from ddpm_ext.ops.row import ROW
from ddpm_ext.tables.step_table import StepTable

CACHED_VIEWS = 4  # the number of pairs (batch size, device) whose timestep tensors are cached


class DeviceTables:
    """Tables with names, in float32 and float64. They are on the CPU, and are copied to another device at first use."""

    def __init__(self, **tables: Tensor) -> None:
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        with torch.inference_mode(False):  # Inference tensors could not be saved for a backward pass later on.
            for dtype in (torch.float32, torch.float64):
                for name, table in tables.items():
                    self._tables[name, torch.device("cpu"), dtype] = table.to(dtype, copy=True).contiguous()

    def find(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Like get, but returns None where no table has that name."""
        return self.get(name, device, dtype) if (name, torch.device("cpu"), dtype) in self._tables else None

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table with that name. Raises KeyError where no table has it."""
        table = self._tables.get((name, device, dtype))
        if table is None:
            check_card(device)
            with torch.inference_mode(False):
                table = self._tables[name, torch.device("cpu"), dtype].to(device)
            # A tensor made within a function transform or a fake mode can't be used after the transform or mode ends.
            if is_plain(table):
                self._tables[name, device, dtype] = table
        if not table.is_cpu:
            in_use(self, self._tables, device)
        return table

    def __getstate__(self) -> dict[str, object]:
        """Only the CPU tables are pickled, since the machine that unpickles them may not have the other devices."""
        return {**self.__dict__, "_tables": {key: table for key, table in self._tables.items() if key[1].type == "cpu"}}


class KernelTables(DeviceTables):
    """The packed rows of a step table, and further tables.

    The table "steps" has the packed rows. The table "x0" has rows that return the predicted clean sample in place of
    the next sample.

    Args:
        steps: the step table.
        guidance: (rows,), scales of classifier-free guidance. None means ones.
        tables: further tables, by name.
    """

    def __init__(self, steps: StepTable, guidance: Tensor | None = None, **tables: Tensor) -> None:
        super().__init__(**tables)
        self._views: BoundedCache[dict[int, Tensor]] = BoundedCache(CACHED_VIEWS)
        cpu = torch.device("cpu")
        with torch.inference_mode(False):
            for dtype in (torch.float32, torch.float64):
                rows = self._tables["steps", cpu, dtype] = steps.packed(cpu, dtype, guidance)
                self._tables["x0", cpu, dtype] = _to_x0(rows)
            # The model gets float32 timesteps if the step table has floats, even if these are whole numbers.
            fractional = steps.timestep.is_floating_point()
            self._timestep_dtype = torch.float32 if fractional else torch.int64
            timestep = steps.timestep.to(cpu, self._timestep_dtype, copy=True)
            self._tables["timesteps", cpu, self._timestep_dtype] = timestep

    def __len__(self) -> int:
        """How many rows the step table has."""
        return len(self.timesteps(torch.device("cpu")))

    def timesteps(self, device: torch.device) -> Tensor:
        """The model's timesteps, (rows,): int64, or float32 if those of the step table are floats."""
        return self.get("timesteps", device, self._timestep_dtype)

    def timestep(self, row: int, batch: int, device: torch.device) -> Tensor:
        """The timestep of a row, repeated for each sample, (batch,), cached.

        A cached tensor to which a model has written is replaced by a new one.
        """
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
        if not 0 <= row < len(timesteps):  # only calls under torch.compile arrive here without an earlier check
            raise ValueError(f"t is {row}, expected 0 <= t < {len(timesteps)}")
        # The model gets views of a copy, never of the table, since it could write to them.
        if torch.compiler.is_compiling():
            return timesteps[row].clone().expand(batch)
        key = "given timesteps", device, self._timestep_dtype
        timesteps_copy = self._tables.get(key)
        if timesteps_copy is None or timesteps_copy._version:
            timesteps_copy = self.timesteps(torch.device("cpu")).to(device, copy=True)
            if is_plain(timesteps_copy):
                self._tables[key] = timesteps_copy
        return timesteps_copy[row].expand(batch)


def _to_x0(rows: Tensor) -> Tensor:
    """Packed rows that return the predicted clean sample of `rows` in place of the next sample."""
    x0_rows = torch.zeros_like(rows)
    x0_rows[:, ROW.index("c0")] = 1
    # Copied as integers: the bits of `draw` are an integer, which may be a NaN as a float.
    bits = torch.int32 if rows.dtype == torch.float32 else torch.int64
    for i in map(ROW.index, ("a", "b", "draw", "w", "c_in")):
        x0_rows.view(bits)[:, i] = rows.view(bits)[:, i]
    return x0_rows
