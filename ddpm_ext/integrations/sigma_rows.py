"""SigmaRows: the rows of a loop over sigmas, grouped into steps.

A step has a row for each call of the model. A row without a call may begin the first step, as for churn, or end a step,
as for dpmpp_2m_cfg_pp.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.tables.step_table import StepTable

SAME_LEVEL = 1e-9  # levels count as equal if their relative difference is at most this


class SigmaRows(NamedTuple):
    """The rows of a loop over sigmas.

    Attributes:
        stepper: takes the rows.
        sigma: float64 (rows,), the sigma with which the model is called.
        arrives: float64 (rows,), the sigma to which each row leads.
        steps: the indices of the rows of each step.
    """

    stepper: RowStepper
    sigma: Tensor
    arrives: Tensor
    steps: list[list[int]]

    @classmethod
    def of(cls, table: StepTable, step_starts: list[int]) -> SigmaRows:
        """Groups the rows into steps.

        Args:
            step_starts: the row with which each step begins. All rows before step_starts[1] belong to the first step.
        """
        ends = [*step_starts[1:], len(table)]
        steps = [list(range(first, end)) for first, end in zip([0, *step_starts[1:]], ends, strict=True)]
        return cls(RowStepper(table), table.timestep, table.noise_after, steps)


def first_rows(table: StepTable, sigmas: Tensor) -> list[int]:
    """The indices of the rows with which the steps from these sigmas begin.

    Such a row reads the model's output, changes the level, and has the step's sigma as its timestep. The row of a
    step's second call of the model does not: it has a different sigma, or it leads from a level to the same level.
    """
    ratio, ratio_after = table.noise_now * table.signal_after, table.noise_after * table.signal_now
    moves = (ratio - ratio_after).abs() > SAME_LEVEL * ratio
    step_starts: list[int] = []
    calls = (table.b != 0) | (table.c2 != 0)
    for row, is_first in enumerate((moves & calls).tolist()):
        if is_first and len(step_starts) < len(sigmas) and table.timestep[row] == sigmas[len(step_starts)]:
            step_starts.append(row)
    return step_starts


def first_rows_or_all(table: StepTable, sigmas: Tensor) -> list[int]:
    """The indices of the rows with which steps begin, for a function that calls no callback.

    The calls of a callback would show where steps begin. Without them, the rows are those of first_rows. If first_rows
    finds none for some sigma, they are all rows of the table, up to the number of sigmas.
    """
    step_starts = first_rows(table, sigmas)
    return step_starts if len(step_starts) == len(sigmas) else list(range(min(len(sigmas), len(table))))
