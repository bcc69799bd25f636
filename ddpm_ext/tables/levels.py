"""Levels: how much signal and how much noise a sample has, as a pair (signal, noise) with x = signal x0 + noise eps.

With r = sqrt(signal^2 + noise^2), x / r is variance preserving, and its alphas_cumprod is signal^2 / r^2. So samplers
make rows for x / r, and StepTable.scaled turns them into rows for x. r is a function of the ratio of signal and noise,
a `Scale`. Without one, r is 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["LEVELS", "Scale", "edm", "flow", "sigma_space", "straight", "unit_levels"]

# The columns of a StepTable that hold levels: where a row starts, and where it arrives.
LEVELS = ("signal_now", "noise_now", "signal_after", "noise_after")

# r, (n,), of levels that are given as signal and noise, (n,) each, with signal^2 + noise^2 = 1.
Scale = Callable[[Tensor, Tensor], Tensor]


def flow(signal: Tensor, noise: Tensor) -> Tensor:
    """The scale of signal + noise = 1: rectified flow, Liu et al. 2022, eq. (1); Lipman et al. 2022."""
    return 1 / (signal + noise)


def sigma_space(signal: Tensor, noise: Tensor) -> Tensor:
    """The scale of a signal of 1 with noise of standard deviation sigma: Karras et al. 2022; k-diffusion."""
    return 1 / signal


def edm(signal: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The scale in which EDM's network takes its input: c_in = 1 / sqrt(sigma^2 + sigma_data^2) times that of
    sigma_space, Karras et al. 2022, table 1. Clean data has a signal of 1."""
    return torch.where(noise == 0, 1 / signal, 1 / (noise**2 + sigma_data**2 * signal**2).sqrt())


def straight(signal: Tensor, noise: Tensor, *, nodes: tuple[Tensor, Tensor]) -> Tensor:
    """A scale by known levels: between two neighbours of them, and beyond the outermost two, levels lie on the straight
    line through both in the plane of signal and noise.

    Args:
        nodes: signal and noise of the known levels, (nodes,), from the least noise relative to the signal to the most.
    """
    p, q = nodes
    if len(p) == 1:
        return torch.hypot(p, q).expand(len(signal))
    high = torch.searchsorted(torch.atan2(q, p), torch.atan2(noise, signal)).clamp(1, len(p) - 1)
    low = high - 1
    # The sines between the wanted direction and both ends, times their lengths.
    to_low, to_high = (signal * q[i] - noise * p[i] for i in (low, high))
    return (p[low] * q[high] - q[low] * p[high]) / (to_high - to_low)


def unit_levels(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), float64 on the CPU."""
    power = alphas_cumprod.cpu().numpy()  # numpy's root is rounded alike on every machine, unlike torch's
    return torch.from_numpy(np.sqrt(power)), torch.from_numpy(np.sqrt(1 - power))
