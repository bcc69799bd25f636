"""repaint adds rows to a table that jump back to more noise, for inpainting."""

from __future__ import annotations

import torch

from ddpm_ext.base import checks
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table import COLUMNS, StepTable
from ddpm_ext.tables.step_table_columns import default_draws

__all__ = ["repaint"]


def repaint(table: StepTable, *, jump_length: int = 10, jump_n_sample: int = 10) -> StepTable:
    """Adds jumps back to more noise to a table, so that the inpainted region comes to fit the known image.

    RePaint, Lugmayr et al. 2022, algorithm 1, in the order of its authors' get_schedule_jump. After every `jump_length`
    rows, counted from the table's end, the loop jumps back over these rows and takes them again, until it has taken
    them `jump_n_sample` times. A jump is one row, a step of the forward process: c1 = signal_after / signal_now, s^2 =
    noise_after^2 - c1^2 noise_now^2. It does not call the model (a = b = c0 = c2 = 0). Its timestep is the timestep
    where it starts. All rows have different draws of noise. The notes stay.

    Args:
        table: descending, without history, with the columns of levels.
        jump_length: how many rows a jump goes back, at least 1.
        jump_n_sample: how many times each sequence of rows is taken, at least 1. 1 means no jumps.

    Raises:
        TypeError: `table` is not a StepTable, or `jump_length` or `jump_n_sample` is not an int.
        ValueError: `jump_length` or `jump_n_sample` is below 1; a table that does not descend from row to row, or has
            history.

    Examples:
        >>> from ddpm_ext.tables.samplers import ddpm
        >>> repaint(ddpm(grid), jump_length=1, jump_n_sample=2).timestep.tolist()
        [999, 499, 999, 499, 0, 499, 0]
    """
    if not isinstance(table, StepTable):
        raise TypeError(f"table is a {type(table).__name__}, expected a StepTable")
    length = checks.integer("jump_length", jump_length, 2**31, "2^31", start=1)
    passes = checks.integer("jump_n_sample", jump_n_sample, 2**31, "2^31", start=1)
    table = table.to("cpu")
    if table.history:
        raise ValueError("table has history (h1 to k2), which a jump would make another step's, expected none")
    falls = table.noise_now * table.signal_after > table.noise_after * table.signal_now
    is_consecutive = table.signal_now[1:].equal(table.signal_after[:-1]) and table.noise_now[1:].equal(
        table.noise_after[:-1]
    )
    if not (falls.all() and is_consecutive):
        raise ValueError(
            "table does not descend, expected less noise after each row, and each to start where one ended"
        )

    row, rows_back = torch.tensor(_order(len(table), length, passes), device="cpu").T
    is_jump = rows_back > 0
    signal, noise = table.signal_now[row], table.noise_now[row]
    signal_after, noise_after = table.signal_now[row - rows_back], table.noise_now[row - rows_back]
    slope = signal_after / signal
    forward = {
        "c1": slope,
        "s": (noise_after**2 - (slope * noise) ** 2)
        .clamp(min=0)
        .sqrt(),  # below 0 only by rounding: the table descends
        **dict(zip(LEVELS, (signal, noise, signal_after, noise_after), strict=True)),
    }
    zeros = torch.zeros_like(slope)
    columns = {
        name: torch.where(is_jump, forward.get(name, zeros), getattr(table, name)[row])
        for name in COLUMNS
        if name not in ("timestep", "draw")
    }
    draw = default_draws(table.draw[row].numpy())
    return StepTable(timestep=table.timestep[row], draw=draw, **columns, notes=table.notes)


def _order(rows: int, length: int, passes: int) -> list[tuple[int, int]]:
    """The loop's order: (row, 0) for a row, and (row, length) for a jump from the level where this row starts."""
    # {number of rows after the row where jumps start: jumps that are left}
    jumps_left = dict.fromkeys(range(0, rows - length, length), passes - 1)
    order: list[tuple[int, int]] = []
    i = 0
    while i < rows:
        if jumps_left.get(rows - 1 - i, 0) > 0:
            jumps_left[rows - 1 - i] -= 1
            order.append((i, length))
            i -= length
        order.append((i, 0))
        i += 1
    return order
