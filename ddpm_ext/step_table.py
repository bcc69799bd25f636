"""A reverse process as rows of numbers to hold: to look at, compare, keep in a file, draw, and give to a kernel.

A row is a step, with x the sample, m the model's output and z a standard normal:

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext import checks
from ddpm_ext.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ColumnDiff", "StepRow", "StepTable", "TableDiff"]

FORMAT, VERSION = "ddpm_ext.StepTable", 1
SHOWN = 5  # rows at either end of a long table's repr
Values = Tensor | npt.ArrayLike


class StepRow(NamedTuple):
    """A row of a StepTable: one step, as Python numbers."""

    timestep: int | float
    a: float
    b: float
    c0: float
    c1: float
    c2: float
    s: float
    draw: int


COLUMNS = StepRow._fields
FACTORS = COLUMNS[1:-1]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class StepTable:
    """The rows of a reverse process, in the order in which a loop takes them: see the module's equations.

        StepTable(timestep=[2, 1, 0], a=[...], b=[...], c0=[...], c1=[...], s=[...])

    Args, each (rows,), a tensor of any device, an array or a list; copied:
        timestep: integers, or floats for a sampler that visits timesteps between them: what the model is told.
        a, b, c0, c1: real numbers, finite.
        c2, s: as well; None: zeros.
        draw: integers, 0 <= draw < 2^32: which noise each row draws. None: the timestep, plus visit * (largest
            timestep + 1) where it comes again; the row's number where any timestep is fractional or negative.

    Attributes:
        timestep: (rows,), int64, or float64 where floats were given.
        a, b, c0, c1, c2, s: float64 (rows,).
        draw: int64 (rows,).
        All on the CPU; `to` makes a table that lies elsewhere. They are not to be written to.

    `len(table)`, iteration and `table[i]` (a StepRow) are as a list's; `table[i:j:k]` is a StepTable, whose rows keep
    their draws. Tables are equal where all columns are, exactly, and the timesteps are both integers or both floats.

    Raises:
        TypeError: a column of other things than numbers, or a draw of other things than integers.
        ValueError: a column that is not 1-dimensional, of another length than timestep, or empty; a number that is not
            finite; a draw out of range.
    """

    timestep: Tensor
    a: Tensor
    b: Tensor
    c0: Tensor
    c1: Tensor
    c2: Tensor
    s: Tensor
    draw: Tensor

    def __init__(
        self,
        timestep: Values,
        a: Values,
        b: Values,
        c0: Values,
        c1: Values,
        c2: Values | None = None,
        s: Values | None = None,
        draw: Values | None = None,
    ) -> None:
        steps = _column("timestep", timestep)
        zeros = np.zeros(len(steps))
        given = (a, b, c0, c1, zeros if c2 is None else c2, zeros if s is None else s)
        columns = {"timestep": steps}
        for name, values in zip(FACTORS, given, strict=True):
            columns[name] = _column(name, values, len(steps)).astype(np.float64)
        columns["draw"] = _default_draws(steps) if draw is None else _column("draw", draw, len(steps))
        _check_draws(columns["draw"])
        # Not inference tensors, which could not be saved for a backward pass later on.
        with torch.inference_mode(False):
            for name, array in columns.items():
                object.__setattr__(self, name, torch.from_numpy(array))

    def _each(self, change: Callable[[Tensor], Tensor]) -> StepTable:
        """With each column changed; what was checked once is not checked again."""
        table = object.__new__(StepTable)
        with torch.inference_mode(False):
            for name in COLUMNS:
                object.__setattr__(table, name, change(getattr(self, name)))
        return table

    # -------------------------------------------------------------------------------------------- as a sequence

    def __len__(self) -> int:
        return len(self.timestep)

    @overload
    def __getitem__(self, at: int) -> StepRow: ...

    @overload
    def __getitem__(self, at: slice) -> StepTable: ...

    def __getitem__(self, at: int | slice) -> StepRow | StepTable:
        """Row `at`, or the rows of a slice as a table.

        Raises:
            IndexError: no such row. ValueError: a slice without a row. TypeError: neither an int nor a slice.
        """
        rows = len(self)
        if isinstance(at, slice):
            picked = range(rows)[at]
            if not picked:
                raise ValueError(f"{at} of a table of {rows} rows is empty, expected at least 1 row")
            return self._each(lambda column: column[torch.tensor(picked, device=column.device)])
        try:
            i = index(at)
        except TypeError:
            raise TypeError(f"a table's index is {at!r}, expected an int or a slice") from None
        if not -rows <= i < rows:
            raise IndexError(f"row {i} of a table of {rows} rows")
        return StepRow(*(getattr(self, name)[i].item() for name in COLUMNS))

    def __iter__(self) -> Iterator[StepRow]:
        return map(StepRow, *(getattr(self, name).tolist() for name in COLUMNS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepTable):
            return NotImplemented
        return not self.diff(other)

    def __repr__(self) -> str:
        rows, device = len(self), self.timestep.device
        shown = list(range(rows))
        if rows > 2 * SHOWN + 1:  # to leave out one row would save no line
            shown[SHOWN:-SHOWN] = [-1]
        lines = [["row", *COLUMNS]]
        for i in shown:
            lines.append([str(i), *map(_short, self[i])] if i >= 0 else ["..."] * len(lines[0]))
        title = f"StepTable of {rows} row{'s' * (rows != 1)}{'' if device.type == 'cpu' else f' on {device}'}"
        return f"{title}\n{_aligned(lines)}"

    # ------------------------------------------------------------------------------------------------ on devices

    def to(self, device: torch.device | str) -> StepTable:
        """The table with its columns on `device`; they are the same tensors where they are there already.

        For arithmetic on the columns there. Kernels take `packed`. What reads single numbers (rows, repr, save, ...)
        works as on the CPU, and waits for the device.

        Raises:
            ValueError: not a device.
        """
        there = checks.device(device)
        return self._each(lambda column: column.to(there))

    def packed(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The kernels' form, (rows, 8) on `device`: a, b, c0, c1, c2, s, the draw's bits as an integer of the same
        width as `dtype` (float32, or float64 for the reference), and a zero.

        Raises:
            TypeError: another dtype. ValueError: not a device.
        """
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
        there = checks.device(device)
        table = torch.zeros(len(self), 8, dtype=dtype, device="cpu")
        for column, name in enumerate(FACTORS):
            table[:, column] = getattr(self, name)
        # Draws from 2^31 up wrap to negative int32, whose bits are those of the kernel's uint32.
        table.view(torch.int32 if dtype == torch.float32 else torch.int64)[:, 6] = self.draw
        return table.to(there)

    # --------------------------------------------------------------------------------------------------- in files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to `path` as JSON, atomically: one line a row, with digits enough to be read back exactly.

        Raises:
            ValueError: `path` is a folder or a device. OSError: it can't be written.
        """
        rows = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in self)
        head = f'  "format": "{FORMAT}",\n  "version": {VERSION},\n  "columns": {json.dumps(COLUMNS)}'
        write_text(path, f'{{\n{head},\n  "rows": [\n{rows}\n  ]\n}}\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepTable:
        """The table that `save` wrote to `path`, equal in every bit.

        Raises:
            ValueError, naming `path`: not JSON, another format, a newer version, columns missing or unknown, or numbers
            that a StepTable refuses. OSError: it can't be read.
        """
        content = Path(path).read_bytes()
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        try:
            return cls(**_parse(found))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    # ------------------------------------------------------------------------------------------- looked at, compared

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The columns over the steps, as a matplotlib figure, which is also written to `path` where one is given.

        Raises:
            MissingExtra: matplotlib is not installed. ValueError, OSError: `path` can't be written.
        """
        from ddpm_ext.plots import step_table_figure  # an extra, of which the core knows nothing until here

        return step_table_figure(self, path)

    def diff(self, other: StepTable) -> TableDiff:
        """Where the tables differ and by how much; false where they are equal. `print` it, or ask its columns.

        Where one has more rows, the rows that both have are compared.

        Raises:
            TypeError: `other` is not a StepTable.
        """
        if not isinstance(other, StepTable):
            raise TypeError(f"other is a {type(other).__name__}, expected a StepTable")
        rows = (len(self), len(other))
        columns = {}
        for name in COLUMNS:
            here, there = (getattr(table, name)[: min(rows)].cpu() for table in (self, other))
            at = (here != there).nonzero()[:, 0]
            if len(at):
                columns[name] = _compare(at.tolist(), here[at].tolist(), there[at].tolist())
        return TableDiff(rows, (self.timestep.dtype, other.timestep.dtype), columns)


class ColumnDiff(NamedTuple):
    """How two tables' columns differ.

    rows: how many rows do; first: the first of them; here, there: its two values; absolute: the largest |here - there|
    of all rows; relative: the largest |here - there| / max(|here|, |there|), from 0 to 2.
    """

    rows: int
    first: int
    here: int | float
    there: int | float
    absolute: int | float
    relative: float


@dataclass(frozen=True)
class TableDiff:
    """How two tables differ: their numbers of rows, their timesteps' dtypes, and by name the columns that do.

    False where they don't differ. As a string, a report.
    """

    rows: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    columns: dict[str, ColumnDiff]

    def __bool__(self) -> bool:
        return bool(self.columns) or self.rows[0] != self.rows[1] or self.dtypes[0] != self.dtypes[1]

    def __str__(self) -> str:
        if not self:
            return "no difference"
        report = []
        if self.rows[0] != self.rows[1]:
            report.append(f"rows: {self.rows[0]} here, {self.rows[1]} there; the first {min(self.rows)} compared")
        if self.dtypes[0] != self.dtypes[1]:
            report.append("timestep: {} here, {} there".format(*(str(dtype)[6:] for dtype in self.dtypes)))
        if self.columns:
            lines = [["column", "rows", "first", "here", "there", "max absolute", "max relative"]]
            lines += [[name, *map(_short, found)] for name, found in self.columns.items()]
            report.append(_aligned(lines))
        return "\n".join(report)


def _compare(at: list[int], here: list[float], there: list[float]) -> ColumnDiff:
    absolute, relative = 0.0, 0.0
    for x, y in zip(here, there, strict=True):
        distance, largest = abs(x - y), max(abs(x), abs(y))
        absolute = max(absolute, distance)
        relative = max(relative, distance / largest if distance < math.inf else abs(x / largest - y / largest))
    return ColumnDiff(len(at), at[0], here[0], there[0], absolute, relative)


def _short(value: int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _column(name: str, values: Values, rows: int | None = None) -> npt.NDArray[Any]:
    """A copy, (rows,), int64 or float64 as the values are; draw: int64. `rows` None: any number but 0."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    elif isinstance(values, list | tuple) and any(isinstance(value, bool) for value in values):
        raise TypeError(f"{name} holds a bool, expected numbers")  # numpy makes 1.0 of one that is among floats
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is not 1-dimensional: {error}") from None
    if array.dtype.kind not in ("iu" if name == "draw" else "iuf") and array.size:
        others = [type(value).__name__ for value in array.flat if not isinstance(value, int | float)]
        if array.dtype == object and not others:
            raise ValueError(f"{name} holds {max(array.flat, key=abs)}, expected numbers below 2^63")
        held = others[0] if array.dtype == object else array.dtype
        raise TypeError(f"{name} holds {held}, expected {'integers' if name == 'draw' else 'real numbers'}")
    if rows is None:
        if array.ndim != 1 or not array.size:
            raise ValueError(f"{name} has shape {array.shape}, expected (rows,) with at least 1 row")
    elif array.shape != (rows,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({rows},), one a row as timestep")
    if array.dtype.kind == "u" and (array > 2**63 - 1).any():
        raise ValueError(f"{name} holds {array.max()}, expected numbers below 2^63")
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if not np.isfinite(array).all():
        i = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"{name}[{i}] is {array[i]}, expected finite numbers")
    return array


def _default_draws(timestep: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of each row another one, and a timestep's own wherever it is visited once: see StepTable."""
    if (timestep < 0).any() or (timestep % 1 != 0).any():
        return np.arange(len(timestep), dtype=np.int64)
    around = int(timestep.max()) + 1
    visits: Counter[int] = Counter()
    draws = []
    for t in map(int, timestep):
        draws.append(t + visits[t] * around)
        visits[t] += 1
    if max(draws) >= 2**32:
        i = next(i for i, draw in enumerate(draws) if draw >= 2**32)
        raise ValueError(
            f"timestep[{i}] is {timestep[i]}, which would draw noise {draws[i]}, expected 0 <= draw < 2^32: give draw"
        )
    return np.array(draws, dtype=np.int64)


def _check_draws(draw: npt.NDArray[Any]) -> None:
    bad = (draw < 0) | (draw >= 2**32)
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"draw[{i}] is {draw[i]}, expected 0 <= draw < 2^32")


def _parse(found: Any) -> dict[str, list[Any]]:
    """The columns of a file's JSON, by name."""
    name = found.get("format") if isinstance(found, dict) else None
    if name != FORMAT:
        raise ValueError(f"format is {name!r}, expected {FORMAT!r}")
    version = found.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version is {version!r}, expected an int from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(f"version is {version}, newer than this ddpm_ext, which reads up to {VERSION}")
    names, rows = found.get("columns"), found.get("rows")
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(COLUMNS):
        raise ValueError(f"columns are {names!r}, expected {', '.join(COLUMNS)}, each once")
    if not isinstance(rows, list) or not rows:
        raise ValueError("rows are missing, expected a list of at least 1 row")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError(f"rows[{i}] is {row!r}, expected a list of {len(names)} numbers")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
