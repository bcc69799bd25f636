"""A reverse process as rows of numbers to hold: to look at, compare, keep in a file, draw, and give to a kernel.

A row is a step, with x the sample, m the model's output and z a standard normal:

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample

Some steps need more, with h the x0 of the loop's previous step, v a variance that the model tells beside m, and g a
classifier's gradient:

    x0   = clip(a x + b m) + g0 g
    prev = c0 x0 + c1 x + c2 m + c3 h + V g1 g + S z

    S = s              V = 1                    a fixed variance
    S = s e            V = e^2                  a learned one, e = exp(l0 + l1 v) its root
    S = s sqrt(v)      V = v                    a learned one that v is itself
"""

from __future__ import annotations

import json
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

from ddpm_ext.base import checks
from ddpm_ext.base.files import write_text
from ddpm_ext.base.optional import require
from ddpm_ext.tables.step_table_diff import ColumnDiff, TableDiff, aligned, compare, short

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
    c3: float = 0.0
    l0: float = 0.0
    l1: float = 0.0
    g0: float = 0.0
    g1: float = 0.0
    now: float = 0.0
    after: float = 0.0


COLUMNS = StepRow._fields
PLAIN, ADDED = COLUMNS[:8], COLUMNS[8:]
FACTORS = PLAIN[1:-1]
EXTENDED = ("c3", "l0", "l1")  # where they are not 0, the plain kernel can't take the row


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
        c3, l0, l1, g0, g1: real numbers, finite; None: zeros.
        now, after: alphas_cumprod where the row starts and where it arrives, in [0, 1]; None: zeros, not known.

    Attributes:
        timestep: (rows,), int64, or float64 where floats were given.
        draw: int64 (rows,).

    The others are float64 (rows,). All are on the CPU; `to` makes a table that lies elsewhere. They are not to be
    written to.

    `len(table)`, iteration and `table[i]` (a StepRow) are as a list's; `table[i:j:k]` is a StepTable, whose rows keep
    their draws. Tables are equal where all columns are, exactly, and the timesteps are both integers or both floats.

    Raises:
        TypeError: a column of other things than numbers, or a draw of other things than integers.
        ValueError: a column that is not 1-dimensional, of another length than timestep, or empty; a number that is not
            finite; a draw, now or after out of range.
    """

    timestep: Tensor
    a: Tensor
    b: Tensor
    c0: Tensor
    c1: Tensor
    c2: Tensor
    s: Tensor
    draw: Tensor
    c3: Tensor
    l0: Tensor
    l1: Tensor
    g0: Tensor
    g1: Tensor
    now: Tensor
    after: Tensor

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
        *,
        c3: Values | None = None,
        l0: Values | None = None,
        l1: Values | None = None,
        g0: Values | None = None,
        g1: Values | None = None,
        now: Values | None = None,
        after: Values | None = None,
    ) -> None:
        steps = _column("timestep", timestep)
        columns = {"timestep": steps}
        for name, needed in zip(("a", "b", "c0", "c1"), (a, b, c0, c1), strict=True):
            columns[name] = _column(name, needed, len(steps)).astype(np.float64)
        others = (c2, s, c3, l0, l1, g0, g1, now, after)
        for name, values in zip(("c2", "s", *ADDED), others, strict=True):
            values = np.zeros(len(steps)) if values is None else values
            columns[name] = _column(name, values, len(steps)).astype(np.float64)
        columns["draw"] = _default_draws(steps) if draw is None else _column("draw", draw, len(steps))
        _check_draws(columns["draw"])
        for name in ("now", "after"):
            _check_levels(name, columns[name])
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
        """The rows, aligned: c3, l0 and l1 where not all of them are 0; without g0, g1, now and after."""
        rows, device = len(self), self.timestep.device
        shown = list(range(rows))
        if rows > 2 * SHOWN + 1:  # to leave out one row would save no line
            shown[SHOWN:-SHOWN] = [-1]
        names = [*PLAIN, *(name for name in EXTENDED if (getattr(self, name) != 0).any())]
        lines = [["row", *names]]
        for i in shown:
            row = self[i]._asdict()
            lines.append([str(i), *(short(row[name]) for name in names)] if i >= 0 else ["..."] * len(lines[0]))
        title = f"StepTable of {rows} row{'s' * (rows != 1)}{'' if device.type == 'cpu' else f' on {device}'}"
        return f"{title}\n{aligned(lines)}"

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
        return self._packed(device, dtype, [])

    def packed_extended(
        self,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        guidance: Values | None = None,
    ) -> Tensor:
        """The extended kernels' form, (rows, 16) on `device`: seven columns as packed's, then c3, l0, l1, g0, g1,
        sqrt(after), sqrt(1 - after), the scale of classifier-free guidance, and a zero.

        Args:
            guidance: (rows,), finite; None: ones.

        Raises:
            TypeError: another dtype, or a guidance of other things than numbers.
            ValueError: not a device, or a guidance of another length, or not finite.
        """
        scale = torch.from_numpy(_column("guidance", np.ones(len(self)) if guidance is None else guidance, len(self)))
        after = self.after.cpu().numpy()  # whose root is rounded alike everywhere, unlike torch's
        known = [torch.from_numpy(np.sqrt(power)) for power in (after, 1 - after)]
        return self._packed(device, dtype, [self.c3, self.l0, self.l1, self.g0, self.g1, *known, scale])

    def _packed(self, device: torch.device | str, dtype: torch.dtype, added: list[Tensor]) -> Tensor:
        """In blocks of 8 numbers a row; `added` from the eighth on."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
        there = checks.device(device)
        table = torch.zeros(len(self), 16 if added else 8, dtype=dtype, device="cpu")
        for column, name in enumerate(FACTORS):
            table[:, column] = getattr(self, name)
        # Draws from 2^31 up wrap to negative int32, whose bits are those of the kernel's uint32.
        table.view(torch.int32 if dtype == torch.float32 else torch.int64)[:, 6] = self.draw
        for column, values in enumerate(added, start=7):
            table[:, column] = values
        return table.to(there)

    @property
    def extended(self) -> bool:
        """Whether any c3, l0 or l1 is not 0, so that the rows are the extended kernels' alone."""
        return any(bool((getattr(self, name) != 0).any()) for name in EXTENDED)

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
        """The table that `save` wrote to `path`, equal in every bit. Columns from c3 on may be missing: zeros.

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
        # Pictures are an extra that stands above the tables, so the module is looked up here and not imported.
        return require("ddpm_ext.plots", "drawing a step table").step_table_figure(self, path)

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
                columns[name] = compare(at.tolist(), here[at].tolist(), there[at].tolist())
        return TableDiff(rows, (self.timestep.dtype, other.timestep.dtype), columns)


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


def _check_levels(name: str, levels: npt.NDArray[Any]) -> None:
    bad = (levels < 0) | (levels > 1)
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"{name}[{i}] is {levels[i]}, expected 0 <= {name} <= 1")


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
    texts = list(map(str, names)) if isinstance(names, list) else []
    if len(set(texts)) != len(texts) or not set(PLAIN) <= set(texts) <= set(COLUMNS):
        needed, others = ", ".join(PLAIN), ", ".join(ADDED)
        raise ValueError(f"columns are {names!r}, expected {needed}, each once, and any of {others}")
    if not isinstance(rows, list) or not rows:
        raise ValueError("rows are missing, expected a list of at least 1 row")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError(f"rows[{i}] is {row!r}, expected a list of {len(names)} numbers")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
