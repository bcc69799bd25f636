"""The reverse process as a table: one row of numbers for each step, to print, compare, save, draw or pass to a kernel.

A row takes x, the sample at its timestep, to the next sample. With m the model's output and z a standard normal:

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample

That is the plain step. With options and history, a row also reads u, the model's unconditional output; g, a
classifier's gradient; v, the model's output for its variance; and up to three tensors that earlier rows
kept, H1 the latest. If a tensor is not passed, its term is left out:

    x0   = clip(a x + b m) + g0 g
    prev = c0 x0 + c1 x + c2 m + cu u + h1 H1 + h2 H2 + h3 H3 + V g1 g + S z
    kept = k0 x0 + k1 x + k2 m

    S = s              V = 1                    the variance is fixed
    S = s e            V = e^2                  the variance is learned, and its root is e = exp(l0 + l1 v)
    S = s sqrt(v)      V = v                    the variance is learned, and v is the variance itself

A row in which k0, k1 or k2 is not 0 keeps `kept`: the following rows read it as H1, and the tensor that was H1 becomes
H2. Each sampler chooses what its rows keep, for example x0 or eps.

Only this docstring has the whole equation. The parts of a step that are not in its row (guidance, dynamic thresholding,
inpainting) are in the docstring of ops.step_with_options.
"""

from __future__ import annotations

import os
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from operator import index
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import require
from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.tables import step_table_files, trace
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table_columns import (
    NEEDED,
    NOT_PLAIN,
    OPTIONAL,
    Array,
    Column,
    Values,
    check_float32,
    default_draws,
    numbers,
)
from ddpm_ext.tables.step_table_diff import ColumnDiff, TableDiff, aligned, difference, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ColumnDiff", "StepRow", "StepTable", "TableDiff"]

SHOWN = 5  # a long table's repr has this many rows at either end


@dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """The rows of a reverse process, in the order in which a loop takes them: see the module's equations.

        StepTable(timestep=[2, 1, 0], a=[...], b=[...], c0=[...], c1=[...], s=[...])

    Each column is (rows,): a tensor on any device, an array or a list. The table copies it.

    Args:
        timestep: the timesteps that the model is called with. They are integers, or floats for a sampler that visits
            timesteps between the integers.
        a, b, c0, c1: real numbers, finite.
        c2, s: real numbers, finite. None means zeros.
        draw: a number for each row that selects its noise, since rows with the same draw get the same noise: integers,
            0 <= draw < 2^32. None means timestep + visit * (largest timestep + 1), where visit counts the earlier rows
            with the same timestep. If any timestep is fractional or negative, None means the row's number.
        l0, l1, g0, g1, cu, h1, h2, h3, k0, k1, k2: real numbers, finite. None means zeros.
        signal_now, noise_now: the level where the row starts, x = signal_now x0 + noise_now eps. Both are at least 0.
        signal_after, noise_after: the level where the row arrives, at least 0. For all four, None means zeros. If
            signal and noise are both 0, the level is unknown.
        notes: information for a reader of the table, {name: text, number or list}, as in JSON. Files, slices and
            `dataclasses.replace` keep the notes. A loop warns if its guidance, clip or prediction differs from the
            notes. k_diffusion.sampler and diffusers' TableScheduler clip as the notes say, and accelerate refuses
            another prediction. Tables with different notes may be equal.

    Attributes:
        timestep: (rows,), int64, or float64 where floats were passed.
        draw: int64 (rows,).

    The other columns are float64 (rows,). All are on the CPU; `to` makes a table on another device. Do not write to
    them: `dataclasses.replace(table, s=...)` makes a table with other columns.

    `len(table)`, iteration and `table[i]` (a StepRow) work as for a list. `table[i:j:k]` is a StepTable whose rows keep
    their draws. Tables are equal if all columns are exactly equal and the timesteps are both integers or both floats.

    Raises:
        TypeError: a column that holds anything but numbers, a draw that holds anything but integers, or notes that are
            not a dict or that JSON can't represent.
        ValueError: a column that is not 1-dimensional, is empty, or has another length than timestep; a number that is
            not finite, or an integer of 2^63 or more; a draw or a level out of range.

    Examples:
        >>> StepTable(timestep=[500, 0], a=[2.0, 1.0], b=[-1.5, 0.0], c0=[0.9, 1.0], c1=[0.1, 0.0], s=[0.2, 0.0])
        StepTable of 2 rows
        row  timestep  a     b   c0   c1  c2    s  draw
          0       500  2  -1.5  0.9  0.1   0  0.2   500
          1         0  1     0    1    0   0    0     0
    """

    # The declaration of the columns. The tuples of names below the class, StepRow, checks, files and repr derive from
    # it. The kernels read the columns that ops.row.ROW lists. The type of notes is not dict[str, Any], because mypy
    # would refuse StepTable(**tensors).
    timestep: Column = NEEDED
    a: Column = NEEDED
    b: Column = NEEDED
    c0: Column = NEEDED
    c1: Column = NEEDED
    c2: Column = OPTIONAL
    s: Column = OPTIONAL
    draw: Column = OPTIONAL
    _: KW_ONLY
    l0: Column = NOT_PLAIN
    l1: Column = NOT_PLAIN
    g0: Column = OPTIONAL
    g1: Column = OPTIONAL
    signal_now: Column = OPTIONAL
    noise_now: Column = OPTIONAL
    signal_after: Column = OPTIONAL
    noise_after: Column = OPTIONAL
    cu: Column = NOT_PLAIN
    h1: Column = NOT_PLAIN
    h2: Column = NOT_PLAIN
    h3: Column = NOT_PLAIN
    k0: Column = NOT_PLAIN
    k1: Column = NOT_PLAIN
    k2: Column = NOT_PLAIN
    notes: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = numbers("timestep", self.timestep)
        columns = {"timestep": steps}
        for name in (*FACTORS, *ADDED):
            values = getattr(self, name)
            if values is None and vars(StepTable)[name] is not NEEDED:
                columns[name] = np.zeros(len(steps))
            else:
                columns[name] = numbers(name, values, len(steps)).astype(np.float64)
        columns["draw"] = default_draws(steps) if self.draw is None else numbers("draw", self.draw, len(steps))
        draw = columns["draw"]
        checks.refuse("draw", draw, (draw < 0) | (draw >= 2**32), "0 <= draw < 2^32")
        for name in (name for name in LEVELS if getattr(self, name) is not None):
            checks.refuse(name, columns[name], columns[name] < 0, f"{name} >= 0")
        object.__setattr__(self, "notes", step_table_files.as_notes(self.notes))
        # Inference tensors could not be saved for a backward pass later on.
        with torch.inference_mode(False):
            for name, array in columns.items():
                object.__setattr__(self, name, torch.from_numpy(array))

    def _each(self, change: Callable[[Tensor], Tensor]) -> StepTable:
        """The table with `change` applied to each column. The columns are not checked again."""
        table = object.__new__(StepTable)
        object.__setattr__(table, "notes", self.notes)
        with torch.inference_mode(False):
            for name, values in self._columns().items():
                object.__setattr__(table, name, change(values))
        return table

    def _columns(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in COLUMNS}

    # -------------------------------------------------------------------------------------------- as a sequence

    def __len__(self) -> int:
        return len(self.timestep)

    @overload
    def __getitem__(self, at: int) -> StepRow: ...

    @overload
    def __getitem__(self, at: slice) -> StepTable: ...

    def __getitem__(self, at: int | slice) -> StepRow | StepTable:
        """A row by its index, or the rows of a slice as a table.

        Raises:
            IndexError: no such row. ValueError: a slice without a row. TypeError: neither an int nor a slice.
        """
        rows = len(self)
        if isinstance(at, slice):
            indices = range(rows)[at]
            if not indices:
                raise ValueError(f"{at} of a table of {rows} rows is empty, expected at least 1 row")
            return self._each(lambda column: column[torch.tensor(indices, device=column.device)])
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
        """The rows, aligned, and the notes. A column beyond the plain step's is shown if any of its numbers is not 0;
        g0, g1 and the levels are never shown."""
        rows, device = len(self), self.timestep.device
        shown_rows = list(range(rows))
        if rows > 2 * SHOWN + 1:  # leaving out a single row would save no line
            shown_rows[SHOWN:-SHOWN] = [-1]
        names = [*PLAIN, *(name for name in BEYOND_PLAIN if self._has_nonzero(name))]
        lines = [["row", *names]]
        for i in shown_rows:
            row = self[i]._asdict()
            lines.append([str(i), *(short(row[name]) for name in names)] if i >= 0 else ["..."] * len(lines[0]))
        title = f"StepTable of {rows} row{'s' * (rows != 1)}{'' if device.type == 'cpu' else f' on {device}'}"
        return "\n".join([title, aligned(lines), *(f"{name}: {value}" for name, value in self.notes.items())])

    # ------------------------------------------------------------------------------------------------ on devices

    def to(self, device: torch.device | str) -> StepTable:
        """The table with its columns on `device`. Columns that are on it already are not copied.

        This is for arithmetic on the columns; the kernels take the result of `packed`. Rows, repr, save and
        everything else that reads single numbers work as on the CPU, but wait for the device.

        Raises:
            ValueError: not a device.
        """
        checked = checks.device(device)
        return self._each(lambda column: column.to(checked))

    def packed(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, guidance: Values | None = None
    ) -> Tensor:
        """The rows in the form that the kernels read, `dtype` (rows, WIDTH) on `device`: the numbers of ops.row.ROW,
        then zeros.

        Args:
            dtype: float32, or float64 for the reference. The bits of `draw` are an integer of the same width.
            guidance: w, the scale of classifier-free guidance, (rows,), finite. None means ones.

        Raises:
            TypeError: a wrong dtype, or a guidance that holds anything but numbers.
            ValueError: not a device; a number beyond the range of `dtype`; a guidance of a wrong length, or not finite.

        Examples:
            >>> from ddpm_ext import ops
            >>> from ddpm_ext.tables.samplers import ddim
            >>> rows = ddim(grid).packed("cpu")  # float32 (3, 24)
            >>> x_before = ops.reverse_step(x_t, model(x_t, 999), rows, 0)
        """
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
        checked = checks.device(device)
        columns = {name: getattr(self, name).numpy(force=True) for name in COLUMNS}
        if guidance is not None:
            columns["w"] = numbers("guidance", guidance, len(self))
        return packed_rows(columns, dtype).to(checked)

    def _has_nonzero(self, *names: str) -> bool:
        """Whether any number of these columns is not 0."""
        return any(bool((getattr(self, name) != 0).any()) for name in names)

    @property
    def plain(self) -> bool:
        """Whether the plain step can compute the rows: they use neither u nor history, and have no l0 or l1."""
        return not self._has_nonzero(*BEYOND_PLAIN)

    @property
    def history(self) -> bool:
        """Whether any row keeps a tensor for later rows, or reads a kept tensor."""
        return self._has_nonzero(*HISTORY)

    def scaled(self, before: Tensor, after: Tensor) -> StepTable:
        """The rows for samples that are multiplied by `before` where a row starts, and by `after` where it arrives.

        The tensors that rows keep and the model's outputs stay at the old scale. A classifier's gradient g is taken
        with respect to the multiplied samples.

        Args:
            before, after: float64 (rows,), above 0, on the table's device.
        """
        rows = {
            **dict.fromkeys(("c0", "c2", "cu", "h1", "h2", "h3", "s", "signal_after", "noise_after"), after),
            **dict.fromkeys(("a", "k1"), 1 / before),
            **dict.fromkeys(("g0", "signal_now", "noise_now"), before),
            "c1": after / before,
            "g1": after * before,
        }
        return replace(self, **{name: getattr(self, name) * factor for name, factor in rows.items()})

    # --------------------------------------------------------------------------------------------------- in files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to `path` as JSON, atomically: a line for each row, with enough digits to read it back
        exactly.

        Raises:
            ValueError: `path` is a folder or a device. OSError: it can't be written.

        Examples:
            >>> from ddpm_ext.tables.samplers import ddim
            >>> ddim(grid).save("mine.json")
        """
        step_table_files.write(path, COLUMNS, self, self.notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepTable:
        """Reads the table that `save` wrote to `path`, equal in every bit.

        The file may leave out columns that StepTable declares after `draw`: they are then 0.

        It warns if a row does not start at the level where the previous row arrives, if the rows lead to less noise
        but not to clean samples, or if they lead from clean samples to clean samples.

        Raises:
            ValueError, naming `path`: not JSON, a wrong format or version, columns missing, unknown or repeated, no
            rows, or numbers or notes that a StepTable refuses. OSError: it can't be read.

        Examples:
            >>> from ddpm_ext.tables.samplers import ddim
            >>> ddim(grid).save("mine.json")
            >>> StepTable.load("mine.json") == ddim(grid)
            True
        """
        columns, notes = step_table_files.read(path, PLAIN, ADDED)
        try:
            table = cls(**columns, notes=notes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if (gap := step_table_files.gap_between(*(getattr(table, name) for name in LEVELS))) is not None:
            warnings.warn(f"{path}: {gap}; was a row lost or changed?", stacklevel=2)
        return table

    # ---------------------------------------------------------------------------------------- of other libraries

    @classmethod
    def trace(cls, scheduler: Any, steps: Any, **arguments: Any) -> StepTable:
        """Computes the rows of another library's scheduler by running its steps on random numbers in float64.

        A first run computes the rows. A second run, on random samples of several channels and pixels, checks them.

        Args:
            scheduler: any object with `set_timesteps(steps, **arguments)`, `timesteps`, and diffusers'
                `step(model_output, timestep, sample)`, which returns an object with a `prev_sample`, or a tuple. A copy
                of the object runs. Or a function like k-diffusion's samplers, `scheduler(model, x, sigmas,
                **arguments)`, whose model takes a sample and its sigma and returns the clean sample.
            steps, arguments: the arguments of set_timesteps. For a function, `steps` are its sigmas, (levels,), as a
                tensor or a list, and `arguments` are its further arguments.

        The columns a and b describe the clean sample: the `pred_original_sample` or `denoised` that the steps return,
        or the output of a function's model. The model's output enters the next sample by c0; or by c2, if there is no
        clean sample or if c0's and c1's terms would nearly cancel. k0, k1 and k2 keep the tensor that a later row
        reads, up to a constant factor. If the scheduler clips its clean sample, the rows are for a loop with the same
        clip, which the notes have. The table leaves out how the scheduler scales the model's input; the notes say
        whether it does.

        For a function, a row begins with a call of the model and ends with the next, so that a step with two calls is
        two rows. The row's timestep is the sigma of the call with which it begins. The draw of its noise, from a
        noise_sampler or torch.randn_like, is the row's number.

        Raises:
            TypeError: `scheduler` is neither such an object nor such a function.
            ValueError: a step is not linear (for example, an element of its result depends on several elements of its
                sample), or does not fit into a row (for example, it reads more than three tensors of earlier steps);
                `steps` for which the scheduler has no timesteps; or sigmas that are not at least 2 finite numbers >= 0.

        Examples:
            >>> table = StepTable.trace(diffusers.EulerDiscreteScheduler(), 20)
        """
        columns, notes = trace.trace_table(scheduler, steps, arguments)
        return cls(**columns, notes=notes)

    # ------------------------------------------------------------------------------------- drawn and compared

    def plot(self, path: str | os.PathLike[str] | None = None, *, name: str = "StepTable") -> Figure:
        """Draws the columns over the steps as a matplotlib figure, and writes it to `path` unless `path` is None.

        Args:
            name: the sampler's name, for the title.

        Raises:
            MissingExtra: matplotlib is not installed. ValueError, OSError: `path` can't be written.

        Examples:
            >>> from ddpm_ext.tables.samplers import ddim
            >>> figure = ddim(grid).plot("ddim.png", name="ddim")  # doctest: +SKIP
        """
        # The plots package needs matplotlib, which is optional, and imports the tables: so it is imported here.
        return require("ddpm_ext.plots", "drawing a step table").step_table_figure({name: self}, path)

    def diff(self, other: StepTable) -> TableDiff:
        """Compares two tables: the result says where they differ and by how much, and is false if they are equal.

        `print` the result, or read its `columns`. Only rows that both tables have are compared.

        Raises:
            TypeError: `other` is not a StepTable.

        Examples:
            >>> from ddpm_ext.tables.samplers import ddim, euler_ancestral
            >>> print(ddim(grid, eta=1.0).diff(euler_ancestral(grid)))
            column  rows  first        here      there  max absolute  max relative
                c0     2      0  ...
        """
        if not isinstance(other, StepTable):
            raise TypeError(f"other is a {type(other).__name__}, expected a StepTable")
        return difference(self._columns(), other._columns())


COLUMNS = tuple(column.name for column in fields(StepTable) if column.name != "notes")
PLAIN = tuple(column.name for column in fields(StepTable) if not column.kw_only)  # in every file and every repr
ADDED = tuple(name for name in COLUMNS if name not in PLAIN)
FACTORS = tuple(name for name in PLAIN if name not in ("timestep", "draw"))
BEYOND_PLAIN = tuple(name for name in COLUMNS if vars(StepTable)[name] is NOT_PLAIN)
PLACES = {name: place for place, name in enumerate(ROW)}  # {column: its index in a packed row}
# A packed row before its columns are filled in. w, the scale of guidance, and c_in, the factor from the next sample to
# the model's next input, begin at 1: a table has no columns for them, and other code may set them.
BLANK = np.array([float(name in ("w", "c_in")) for name in ROW] + [0.0] * (WIDTH - len(ROW)))
HISTORY = ("h1", "h2", "h3", "k0", "k1", "k2")
SURELY_FLOAT32 = 2.0**127  # numbers of smaller magnitude fit float32, however they are rounded


def table_of_checked(columns: Mapping[str, Array]) -> StepTable:
    """Makes a table from columns that need no check. The columns are not copied, so the caller must not write to
    them later.

    columns: float64 (rows,), finite, but timestep and draw have the dtypes of StepTable's attributes. Missing columns
        are zeros.
    """
    table = object.__new__(StepTable)
    with torch.inference_mode(False):
        zeros = torch.from_numpy(np.zeros(len(columns["timestep"])))
        tensors = {name: torch.from_numpy(columns[name]) for name in COLUMNS if name in columns}
    vars(table).update(dict.fromkeys(COLUMNS, zeros) | tensors, notes={})
    return table


def packed_rows(columns: Mapping[str, Array], dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows as StepTable.packed returns them, on the CPU.

    columns: {name: (rows,)}, with draw. Missing columns are zeros, but a missing w or c_in is ones.
    """
    draw = columns["draw"]
    table = BLANK[None].repeat(len(draw), 0)
    names = [name for name in columns if name in PLACES and name != "draw"]
    for name in names:
        table[:, PLACES[name]] = columns[name]
    if dtype == torch.float32:
        if not np.abs(table).max(initial=0.0) < SURELY_FLOAT32:
            for name in names:
                check_float32(name, columns[name])
        table = table.astype(np.float32)
    # Draws from 2^31 up wrap to negative int32, which have the bits of the uint32 that the kernel reads.
    table.view(np.int32 if dtype == torch.float32 else np.int64)[:, PLACES["draw"]] = draw
    return torch.from_numpy(table)


class StepRow(namedtuple("StepRow", COLUMNS, defaults=[0.0] * len(ADDED))):  # type: ignore[misc]
    """A row of a StepTable: one step, as Python floats with the columns' names. draw is an int, timestep an int or a
    float.

    Examples:
        >>> from ddpm_ext.tables.samplers import ddim
        >>> ddim(grid)[0].timestep
        999
    """

    __slots__ = ()
