"""The timesteps of levels that lie between a schedule's own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["timestep_at"]


def timestep_at(alphas_cumprod: Tensor, sigma: Tensor) -> Tensor:
    """The timesteps of given sigmas, interpolated in log sigma as k-diffusion does, at most the schedule's ends.

    Args:
        alphas_cumprod: float64 (timesteps,), falling: the schedule's.
        sigma: float64 (n,), sqrt(1 / alphas_cumprod - 1) at the wanted levels, finite and above 0.

    Returns:
        float64 (n,), in [0, timesteps - 1].
    """
    if len(alphas_cumprod) == 1:
        return torch.zeros_like(sigma)
    known, wanted = (1 / alphas_cumprod - 1).sqrt().log(), sigma.log()
    above = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    low, high = known[above - 1], known[above]
    # Next to clean data, whose log sigma is infinite, the quotient is NaN: the timestep after it is the nearest.
    return (above - 1 + ((wanted - low) / (high - low)).nan_to_num(1.0).clamp(0, 1)).double()
