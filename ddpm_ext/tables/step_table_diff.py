"""The difference between two step tables, and numbers as aligned text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ColumnDiff(NamedTuple):
    """The difference between one column of two tables.

    Attributes:
        rows: the number of rows that differ.
        first: the first row that differs.
        here, there: the values of row `first` in the two tables.
        absolute: the largest |here - there| of all rows.
        relative: the largest |here - there| / max(|here|, |there|), from 0 to 2.

    Examples:
        >>> from ddpm_ext.tables.samplers import ddim
        >>> ddim(grid, eta=1.0).diff(ddim(grid)).columns["s"].rows
        2
    """

    rows: int
    first: int
    here: int | float
    there: int | float
    absolute: int | float
    relative: float


@dataclass(frozen=True)
class TableDiff:
    """The difference between two tables. It is false if they are equal. As a string, it is a report.

    Attributes:
        rows: the number of rows of each table.
        dtypes: the dtypes of their timesteps.
        columns: the columns that differ, by name.

    Examples:
        >>> from ddpm_ext.tables.samplers import ddim
        >>> sorted(ddim(grid, eta=1.0).diff(ddim(grid)).columns)
        ['c2', 'g1', 's']
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
            lines += [[name, *map(short, column)] for name, column in self.columns.items()]
            report.append(aligned(lines))
        return "\n".join(report)


def difference(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> TableDiff:
    """The difference between two tables, passed as columns of the same names, (rows,) each; see StepTable.diff."""
    steps = here["timestep"], there["timestep"]
    rows = (len(steps[0]), len(steps[1]))
    columns = {}
    for name in here:
        values_here, values_there = (table[name][: min(rows)].cpu() for table in (here, there))
        differing = (values_here != values_there).nonzero()[:, 0]
        if len(differing):
            columns[name] = _compare(
                differing.tolist(), values_here[differing].tolist(), values_there[differing].tolist()
            )
    return TableDiff(rows, (steps[0].dtype, steps[1].dtype), columns)


def _compare(rows: list[int], here: list[float], there: list[float]) -> ColumnDiff:
    """The difference in one column. rows: the numbers of the rows that differ; here, there: their values, by table."""
    absolute, relative = 0.0, 0.0
    for x, y in zip(here, there, strict=True):
        distance, largest = abs(x - y), max(abs(x), abs(y))
        absolute = max(absolute, distance)
        relative = max(relative, distance / largest if distance < math.inf else abs(x / largest - y / largest))
    return ColumnDiff(len(rows), rows[0], here[0], there[0], absolute, relative)


def short(value: int | float) -> str:
    """A float with six digits, an int with all of them."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text, in columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
