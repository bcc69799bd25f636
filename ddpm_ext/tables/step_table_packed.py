"""Step tables as the kernels read them: one tensor, whose rows have 8 or 16 numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks

__all__ = ["level_roots", "pack"]

WIDTHS = (8, 16)


def pack(
    before: Sequence[Tensor],
    draw: Tensor,
    after: Sequence[Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a kernel's table: the columns `before`, the bits of `draw`, the columns `after`, and zeros to the end.

    Args:
        before, after: (rows,) each.
        draw: int64 (rows,), in [0, 2^32).
        dtype: float32, or float64 for the reference. The draw is an integer of the same width.

    Returns:
        `dtype` (rows, 8) on `device`, or (rows, 16) where 8 are too few.

    Raises:
        TypeError: another dtype. ValueError: not a device.
    """
    there = checks.device(device)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
    width = next(width for width in WIDTHS if width > len(before) + len(after))
    table = torch.zeros(len(draw), width, dtype=dtype, device="cpu")
    for at, values in enumerate(before):
        table[:, at] = values
    # Draws from 2^31 up wrap to negative int32, whose bits are those of the kernel's uint32.
    table.view(torch.int32 if dtype == torch.float32 else torch.int64)[:, len(before)] = draw
    for at, values in enumerate(after, start=len(before) + 1):
        table[:, at] = values
    return table.to(there)


def level_roots(alphas_cumprod: Tensor) -> list[Tensor]:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), on the CPU."""
    power = alphas_cumprod.cpu().numpy()  # numpy's root is rounded alike on every machine, unlike torch's
    return [torch.from_numpy(np.sqrt(part)) for part in (power, 1 - power)]
