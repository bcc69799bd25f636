"""The rows of a loop over sigmas, and which of them belong to one step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.tables.step_table import StepTable

ROUNDED = 1e-9  # how far a level is from its sigma, relatively


class SigmaRows(NamedTuple):
    """The rows of a loop.

    Attributes:
        stepper: takes them, in order.
        sigma: float64 (rows,), what the model is called with.
        arrives: float64 (rows,), the sigma where each row arrives.
        steps: the rows of each step.
    """

    stepper: RowStepper
    sigma: Tensor
    arrives: Tensor
    steps: list[list[int]]

    @classmethod
    def of(cls, table: StepTable, begins: list[int]) -> SigmaRows:
        """begins: the row with which each step begins; rows before the first belong to it."""
        ends = [*begins[1:], len(table)]
        steps = [list(range(first, end)) for first, end in zip([0, *begins[1:]], ends, strict=True)]
        return cls(RowStepper(table), table.timestep, table.noise_after, steps)


def first_rows(table: StepTable, sigmas: Tensor) -> list[int]:
    """The rows with which steps from these sigmas begin. A second call of the model in a step is at another sigma, or
    leads from a level to itself."""
    ratio, ratio_after = table.noise_now * table.signal_after, table.noise_after * table.signal_now
    moves = (ratio - ratio_after).abs() > ROUNDED * ratio
    begins: list[int] = []
    calls = (table.b != 0) | (table.c2 != 0)
    for row, is_first in enumerate((moves & calls).tolist()):
        if is_first and len(begins) < len(sigmas) and table.timestep[row] == sigmas[len(begins)]:
            begins.append(row)
    return begins


def first_rows_untold(table: StepTable, sigmas: Tensor) -> list[int]:
    """first_rows of a function that does not tell its steps; where it calls the model at other sigmas, each row is
    one."""
    begins = first_rows(table, sigmas)
    return begins if len(begins) == len(sigmas) else list(range(min(len(sigmas), len(table))))
