"""The rows of a loop over sigmas, and the rows of each of its steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.tables.step_table import StepTable

SAME_LEVEL = 1e-9  # Levels whose relative difference is at most this count as equal.


class SigmaRows(NamedTuple):
    """The rows of a loop.

    Attributes:
        stepper: takes the rows, in order.
        sigma: float64 (rows,), the sigma with which the model is called.
        arrives: float64 (rows,), the sigma to which each row leads.
        steps: the indices of the rows of each step.
    """

    stepper: RowStepper
    sigma: Tensor
    arrives: Tensor
    steps: list[list[int]]

    @classmethod
    def of(cls, table: StepTable, begins: list[int]) -> SigmaRows:
        """Groups the rows into steps.

        Args:
            begins: the row with which each step begins. All rows before begins[1] belong to the first step.
        """
        ends = [*begins[1:], len(table)]
        steps = [list(range(first, end)) for first, end in zip([0, *begins[1:]], ends, strict=True)]
        return cls(RowStepper(table), table.timestep, table.noise_after, steps)


def first_rows(table: StepTable, sigmas: Tensor) -> list[int]:
    """The indices of the rows with which the steps from these sigmas begin.

    A step's second call of the model has a row that does not count: it starts from a different sigma, or it leads from
    a level to the same level.
    """
    ratio, ratio_after = table.noise_now * table.signal_after, table.noise_after * table.signal_now
    moves = (ratio - ratio_after).abs() > SAME_LEVEL * ratio
    begins: list[int] = []
    calls = (table.b != 0) | (table.c2 != 0)
    for row, is_first in enumerate((moves & calls).tolist()):
        if is_first and len(begins) < len(sigmas) and table.timestep[row] == sigmas[len(begins)]:
            begins.append(row)
    return begins


def first_rows_untold(table: StepTable, sigmas: Tensor) -> list[int]:
    """first_rows for a function that does not call its callback, which would show where steps begin.

    If the function does not call the model at these sigmas, each row counts as a step.
    """
    begins = first_rows(table, sigmas)
    return begins if len(begins) == len(sigmas) else list(range(min(len(sigmas), len(table))))
