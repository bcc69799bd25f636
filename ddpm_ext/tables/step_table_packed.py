"""Step tables as the kernels read them: one tensor, whose rows have 8 or 16 numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_ext.base import checks

__all__ = ["EXTENDED_ROW", "LINEAR_ROW", "PLAIN_ROW", "pack"]

# The columns that the plain, the extended and the linear kernel read, in the order of their rows.
PLAIN_ROW = ("a", "b", "c0", "c1", "c2", "s", "draw")
EXTENDED_ROW = (*PLAIN_ROW, "c3", "l0", "l1", "g0", "g1", "signal_after", "noise_after")
LINEAR_ROW = (*PLAIN_ROW, "cu", "h1", "h2", "h3", "k0", "k1", "k2")
WIDTHS = (8, 16)


def pack(columns: Sequence[tuple[str, Tensor]], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The rows of a kernel's table: the columns in this order, and zeros to the end of the row.

    Args:
        columns: by name, (rows,) each; draw: int64, in [0, 2^32).
        dtype: float32, or float64 for the reference. The draw's bits are an integer of the same width.

    Returns:
        `dtype` (rows, 8) on `device`, or (rows, 16) where 8 are too few.

    Raises:
        TypeError: another dtype. ValueError: not a device, or a number that `dtype` does not hold.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
    there = checks.device(device)
    width = next(width for width in WIDTHS if width >= len(columns))
    table = torch.zeros(len(columns[0][1]), width, dtype=dtype, device="cpu")
    integers = table.view(torch.int32 if dtype == torch.float32 else torch.int64)
    for i, (name, values) in enumerate(columns):
        if name != "draw" and dtype == torch.float32:
            _check_range(name, values)
        # Draws from 2^31 up wrap to negative int32, whose bits are those of the kernel's uint32.
        (integers if name == "draw" else table)[:, i] = values
    return table.to(there)


def _check_range(name: str, values: Tensor) -> None:
    """Raises ValueError if a number is beyond float32."""
    beyond = values.to(torch.float32).isinf()
    if beyond.any():
        i = int(beyond.nonzero()[0])
        raise ValueError(f"{name}[{i}] is {values[i]:.6g}, expected numbers within float32 (backend='reference')")
