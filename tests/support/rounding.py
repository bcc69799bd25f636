"""Numbers with a bound for their rounding errors, and comparisons of results with such numbers or bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from support.operators import HALF_ULP, host


class Number:
    """A float64 number, and the sum of its terms' absolute values (`size`). Rounding errors are a share of that sum."""

    def __init__(self, value: np.ndarray | float, size: np.ndarray | float | None = None) -> None:
        self.value, self.size = value, np.abs(value) if size is None else size

    def __add__(self, other: Number) -> Number:
        return Number(self.value + other.value, self.size + other.size)

    def __sub__(self, other: Number) -> Number:
        return Number(self.value - other.value, self.size + other.size)

    def __mul__(self, other: Number) -> Number:
        return Number(self.value * other.value, self.size * other.size)

    def clip(self, low: float, high: float) -> Number:
        value = np.clip(self.value, low, high)
        # A clipped value is small, but near the clip the result still has the rounding errors of its terms.
        return Number(value, np.maximum(self.size, np.abs(value)))


def roundings(got: torch.Tensor, truth: Number, noise_error: np.ndarray | float = 0.0) -> float:
    """The largest rounding error of a result, in units of 2^-24 times its size.

    Does not count the rounding of the result to its dtype, nor `noise_error`, the error of drawn noise.
    """
    relative, least = HALF_ULP[got.dtype]
    error = np.abs(host(got) - truth.value) - noise_error
    error = error - relative * (np.abs(truth.value) + np.abs(error)) - least
    return float((error / (2.0**-24 * truth.size + 1e-300)).max(initial=0.0))


def different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """The number of elements with different bits, or of all elements if shapes or dtypes differ. All NaNs are equal.

    The elements are float32 or have 16 bits.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.numel(), b.numel(), 1)
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return int(((a.view(whole) != b.view(whole)) & ~(a.isnan() & b.isnan())).sum())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return different_bits(a, b) == 0
