"""Levels: how much signal and how much noise a sample has, as a pair (signal, noise) with x = signal x0 + noise eps.

With r = sqrt(signal^2 + noise^2), x / r is variance preserving, and its alphas_cumprod is signal^2 / r^2. So samplers
make rows for x / r, and StepTable.scaled turns them into rows for x. r is a function of the ratio of signal and noise,
a `Scale`. Without one, r is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks

# The columns of a StepTable that hold levels: where a row starts, and where it arrives.
LEVELS = ("signal_now", "noise_now", "signal_after", "noise_after")

# r, (n,), of levels that are given as signal and noise, (n,) each, with signal^2 + noise^2 = 1.
Scale = Callable[[Tensor, Tensor], Tensor]

# What the model is called with, floating (n,), at levels that are given as signal and noise, float64 (n,) each.
TimestepOf = Callable[[Tensor, Tensor], Tensor]


def flow(signal: Tensor, noise: Tensor) -> Tensor:
    """The scale of signal + noise = 1: rectified flow, Liu et al. 2023, Lipman et al. 2023."""
    return 1 / (signal + noise)


def sigma_space(signal: Tensor, noise: Tensor) -> Tensor:
    """The scale of a signal of 1 with noise of standard deviation sigma: Karras et al. 2022; k-diffusion."""
    return 1 / signal


def edm(signal: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The scale in which EDM's network takes its input: c_in = 1 / sqrt(sigma^2 + sigma_data^2) times that of
    sigma_space, Karras et al. 2022, table 1. Clean data has a signal of 1."""
    return torch.where(noise == 0, 1 / signal, 1 / (noise**2 + sigma_data**2 * signal**2).sqrt())


def flow_timestep(signal: Tensor, noise: Tensor, timesteps: int = 1000) -> Tensor:
    """What the models of flows are called with: `timesteps` times the noise, of levels with signal + noise = 1."""
    return timesteps * noise


def edm_timestep(signal: Tensor, noise: Tensor) -> Tensor:
    """What EDM's network is called with: c_noise = ln(sigma) / 4, Karras et al. 2022, table 1."""
    return (noise / signal).log() / 4


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


def pure_noise(signal: float, noise: float) -> float:
    """The standard deviation of the samples that a loop draws to begin at a level.

    It is the level's noise, as k-diffusion draws sigma_max times a standard normal. Variance-preserving samples begin
    as standard normal ones, of which the signal is a part (Ho et al. 2020, algorithm 2); so does an unknown level.
    """
    power = signal**2 + noise**2
    return 1.0 if power == 0 or abs(power - 1) < 1e-6 else noise


def unit_levels(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), float64 on the CPU."""
    power = alphas_cumprod.cpu().numpy()  # numpy's root is rounded alike on every machine, unlike torch's
    return torch.from_numpy(np.sqrt(power)), torch.from_numpy(np.sqrt(1 - power))


def level_columns(now: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The columns LEVELS of rows for variance-preserving samples.

    Args:
        now, after: (rows,), alphas_cumprod where each row starts and where it arrives.
    """
    return dict(zip(LEVELS, (*unit_levels(now), *unit_levels(after)), strict=True))


def checked_pairs(signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of signal and noise, checked, as float64 (levels,) on the CPU: finite, at least 0, and not both 0."""
    checked = []
    for name, values in (("signal", signal), ("noise", noise)):
        checks.floating(name, values)
        if values.dim() != 1 or len(values) == 0 or len(values) != len(signal):
            shape = tuple(values.shape)
            raise ValueError(f"{name} has shape {shape}, expected (levels,), as many of noise as of signal")
        own = values.detach().to("cpu", torch.float64, copy=True)
        if not (own.isfinite() & (own >= 0)).all():
            raise ValueError(f"{name} reaches from {own.min()} to {own.max()}, expected finite numbers >= 0")
        checked.append(own)
    nothing = (checked[0] == 0) & (checked[1] == 0)
    if nothing.any():
        i = int(nothing.nonzero()[0])
        raise ValueError(f"signal[{i}] and noise[{i}] are both 0, expected one above 0")
    return checked[0], checked[1]


def timesteps_by(function: TimestepOf, signal: Tensor, noise: Tensor) -> Tensor:
    """What the function returns for these levels, checked, as float64 (levels,) on the CPU."""
    found = function(signal, noise)
    checks.tensor("what timestep returns", found)
    if found.shape != signal.shape:
        raise ValueError(
            f"timestep returns a tensor of shape {tuple(found.shape)}, expected {tuple(signal.shape)}, one a level"
        )
    return found.detach().to("cpu", torch.float64)


def checked_timesteps(
    timestep: Tensor | TimestepOf, signal: Tensor, noise: Tensor, expected: str
) -> tuple[Tensor, TimestepOf | None]:
    """What the model is called with at levels (n,): float64 or int64 (n,) on the CPU; and the function that says so.

    expected: the shape that a tensor `timestep` should have, for the error.

    Raises TypeError for what is neither a tensor nor a function, ValueError for another shape, or an empty one.
    """
    timestep_of = None if isinstance(timestep, Tensor) or not callable(timestep) else timestep
    found: Any = timestep if timestep_of is None else timesteps_by(timestep_of, signal, noise)
    checks.tensor("timestep", found)
    if found.shape != signal.shape or not len(found):
        raise ValueError(f"timestep has shape {tuple(found.shape)}, expected {expected}")
    kind = torch.float64 if found.is_floating_point() else torch.int64
    return found.detach().to("cpu", kind, copy=True), timestep_of


def power_share(signal: Tensor, noise: Tensor) -> Tensor:
    """alphas_cumprod of levels of signal and noise: signal^2 / (signal^2 + noise^2)."""
    return signal**2 / (signal**2 + noise**2)


def betas_between(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """1 - alphas_cumprod before / alphas_cumprod after, of levels of signal and noise, without a difference of numbers
    near 1. after: None for those of one timestep less, and clean data at the first."""
    signal, noise = before
    if after is None:
        after = torch.cat([signal.new_ones(1), signal[:-1]]), torch.cat([noise.new_zeros(1), noise[:-1]])
    signal_after, noise_after = after
    return (noise**2 * signal_after**2 - noise_after**2 * signal**2) / ((signal**2 + noise**2) * signal_after**2)
