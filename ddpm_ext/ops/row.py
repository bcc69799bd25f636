"""The numbers of a step's row, in the order in which the kernels read them.

This is the only list of the order in Python. csrc/core/step_row.def is the list for C++, and a test compares the two.
All other code uses the numbers' names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.ops.philox import WORD


class RowNumbers(NamedTuple):
    """The numbers of each sample's row; the equation is in ddpm_ext.tables.step_table."""

    a: Tensor
    b: Tensor
    c0: Tensor
    c1: Tensor
    c2: Tensor
    s: Tensor
    draw: Tensor  # an integer, packed as its bits
    w: Tensor  # the scale of classifier-free guidance
    cu: Tensor
    h1: Tensor
    h2: Tensor
    h3: Tensor
    k0: Tensor
    k1: Tensor
    k2: Tensor
    l0: Tensor
    l1: Tensor
    g0: Tensor
    g1: Tensor
    signal_after: Tensor
    noise_after: Tensor
    c_in: Tensor  # the model's next input is c_in times the next sample


ROW = RowNumbers._fields
WIDTH = 24  # the length of a packed row: the numbers of ROW, then zeros


def row_numbers(table: Tensor, t: int | Tensor, x: Tensor, dtype: torch.dtype) -> RowNumbers:
    """The numbers of each sample's row of a packed table, (rows, WIDTH), float32 or float64.

    Args:
        t: the row of each sample, int64 (batch,), or one int for all. Values of a tensor that are out of range count as
            the nearest row, as in the kernels.
        x: the samples, (batch, ...).

    Returns:
        each number as `dtype` (batch, 1, ...), except the draw, which is int64 (batch,).

    Raises:
        ValueError: the table has a wrong shape.
    """
    if table.dim() != 2 or table.shape[1] != WIDTH:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected (rows, {WIDTH})")
    rows = table[t.clamp(0, len(table) - 1)] if isinstance(t, Tensor) else table[t].expand(len(x), -1)
    integers = torch.int64 if table.dtype == torch.float64 else torch.int32
    numbers = [number.reshape(-1, *[1] * (x.dim() - 1)) for number in rows.to(dtype).unbind(1)]
    numbers[ROW.index("draw")] = rows.view(integers)[:, ROW.index("draw")].long() & WORD
    return RowNumbers(*numbers[: len(ROW)])
