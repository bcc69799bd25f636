"""How two tables' columns differ, and numbers as text in columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["ColumnDiff", "TableDiff", "aligned", "compare", "short"]


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
            lines += [[name, *map(short, found)] for name, found in self.columns.items()]
            report.append(aligned(lines))
        return "\n".join(report)


def compare(at: list[int], here: list[float], there: list[float]) -> ColumnDiff:
    """Of the rows `at` that differ, whose values are `here` and `there`."""
    absolute, relative = 0.0, 0.0
    for x, y in zip(here, there, strict=True):
        distance, largest = abs(x - y), max(abs(x), abs(y))
        absolute = max(absolute, distance)
        relative = max(relative, distance / largest if distance < math.inf else abs(x / largest - y / largest))
    return ColumnDiff(len(at), at[0], here[0], there[0], absolute, relative)


def short(value: int | float) -> str:
    """Six digits of a float, all of an int."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text in columns, to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
