"""What a model predicts, and how the clean sample follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HUGE", "PREDICTIONS", "prediction_coefficients"]

PREDICTIONS = ("eps", "x0", "v")
# Where alphas_cumprod is 0 (or all but) and the model predicts eps, x0 is the sign of x - m once it is clipped:
# a power of two near 1e30, so that both products are exact.
HUGE = 2.0**100


def prediction_coefficients(alphas_cumprod: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """a, b of x0 = a x + b m. eps: eq. (15) of Ho et al. 2020; v: section 4 of Salimans & Ho 2022."""
    if prediction == "x0":
        return torch.zeros_like(alphas_cumprod), torch.ones_like(alphas_cumprod)
    if prediction == "v":
        return alphas_cumprod.sqrt(), -(1 - alphas_cumprod).sqrt()
    a = alphas_cumprod.rsqrt()
    none = a > HUGE
    return torch.where(none, HUGE, a), torch.where(none, -HUGE, -(1 / alphas_cumprod - 1).sqrt())
