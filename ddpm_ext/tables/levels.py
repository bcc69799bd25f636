"""Levels: a level is a pair (signal, noise) that says how much of both a sample has: x = signal x0 + noise eps.

With r = sqrt(signal^2 + noise^2), x / r is variance preserving, and its alphas_cumprod is signal^2 / r^2. So samplers
make rows for x / r, and StepTable.scaled converts them to rows for x. r depends only on the ratio of signal and noise.
A `Scale` is a function that returns r; without a Scale, r is 1.
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

# Returns r, (n,), by which variance-preserving samples y are multiplied: x = r y. It takes the signal and noise of y,
# (n,) each, with signal^2 + noise^2 = 1.
Scale = Callable[[Tensor, Tensor], Tensor]

# Returns the model's timesteps, floating (n,), from the signal and noise of x, float64 (n,) each.
TimestepOf = Callable[[Tensor, Tensor], Tensor]


def flow(signal: Tensor, noise: Tensor) -> Tensor:
    """The scale r of samples x with signal + noise = 1: rectified flow, Liu et al. 2023, Lipman et al. 2023."""
    return 1 / (signal + noise)


def sigma_space(signal: Tensor, noise: Tensor) -> Tensor:
    """The scale r of samples x0 + sigma eps, whose signal is 1: Karras et al. 2022; k-diffusion."""
    return 1 / signal


def edm(signal: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The scale r of the input of EDM's network: Karras et al. 2022, table 1.

    It is c_in = 1 / sqrt(sigma^2 + sigma_data^2) times the scale of sigma_space. At noise 0 the signal is 1 and not
    c_in, so that a loop ends with the clean data itself.
    """
    return torch.where(noise == 0, 1 / signal, 1 / (noise**2 + sigma_data**2 * signal**2).sqrt())


def flow_timestep(signal: Tensor, noise: Tensor, timesteps: int = 1000) -> Tensor:
    """The timestep that a flow's model is called with: `timesteps` times the noise, where signal + noise = 1."""
    return timesteps * noise


def edm_timestep(signal: Tensor, noise: Tensor) -> Tensor:
    """The timestep that EDM's network is called with: c_noise = ln(sigma) / 4, Karras et al. 2022, table 1."""
    return (noise / signal).log() / 4


def straight(signal: Tensor, noise: Tensor, *, nodes: tuple[Tensor, Tensor]) -> Tensor:
    """A scale by linear interpolation in the plane of signal and noise.

    A level between two neighbouring nodes lies on the straight line through both. Beyond an outermost node it lies on
    the line through the two nearest nodes. With a single node, all levels have its scale.

    Args:
        nodes: signal and noise of known levels, (nodes,) each, from the least noise relative to the signal to the most.
    """
    p, q = nodes
    if len(p) == 1:
        return torch.hypot(p, q).expand(len(signal))
    high = torch.searchsorted(torch.atan2(q, p), torch.atan2(noise, signal)).clamp(1, len(p) - 1)
    low = high - 1
    # For the node on either side: its length times the sine of the angle between it and the level, seen from (0, 0).
    to_low, to_high = (signal * q[i] - noise * p[i] for i in (low, high))
    return (p[low] * q[high] - q[low] * p[high]) / (to_high - to_low)


def pure_noise(signal: float, noise: float) -> float:
    """The standard deviation of the random samples with which a loop begins at a level.

    For most samples it is the level's noise: k-diffusion, for example, draws sigma_max times a standard normal. For
    variance-preserving samples it is 1, since signal and noise together have a variance of 1 (Ho et al. 2020,
    algorithm 2). It is also 1 if the level is unknown.
    """
    power = signal**2 + noise**2
    return 1.0 if power == 0 or abs(power - 1) < 1e-6 else noise


def unit_levels(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), float64 on the CPU."""
    power = alphas_cumprod.cpu().numpy()  # numpy's sqrt has the same bits on every machine, unlike torch's
    return torch.from_numpy(np.sqrt(power)), torch.from_numpy(np.sqrt(1 - power))


def level_columns(now: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The columns LEVELS of rows for variance-preserving samples.

    Args:
        now, after: (rows,), alphas_cumprod where each row starts and where it arrives.
    """
    return dict(zip(LEVELS, (*unit_levels(now), *unit_levels(after)), strict=True))


def checked_pairs(signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Checks levels of signal and noise: finite, at least 0, and not both 0. Returns float64 (levels,) on the CPU."""
    checked = []
    for name, values in (("signal", signal), ("noise", noise)):
        checks.floating(name, values)
        if values.dim() != 1 or len(values) == 0 or len(values) != len(signal):
            shape = tuple(values.shape)
            raise ValueError(f"{name} has shape {shape}, expected (levels,), as many of noise as of signal")
        numbers = values.detach().to("cpu", torch.float64, copy=True)
        if not (numbers.isfinite() & (numbers >= 0)).all():
            raise ValueError(f"{name} reaches from {numbers.min()} to {numbers.max()}, expected finite numbers >= 0")
        checked.append(numbers)
    both_zero = (checked[0] == 0) & (checked[1] == 0)
    if both_zero.any():
        i = int(both_zero.nonzero()[0])
        raise ValueError(f"signal[{i}] and noise[{i}] are both 0, expected one above 0")
    return checked[0], checked[1]


def timesteps_by(function: TimestepOf, signal: Tensor, noise: Tensor) -> Tensor:
    """Calls the function for these levels and checks its result. Returns float64 (levels,) on the CPU."""
    timestep = function(signal, noise)
    checks.tensor("what timestep returns", timestep)
    if timestep.shape != signal.shape:
        raise ValueError(
            f"timestep returns a tensor of shape {tuple(timestep.shape)}, expected {tuple(signal.shape)}, one a level"
        )
    return timestep.detach().to("cpu", torch.float64)


def checked_timesteps(
    timestep: Tensor | TimestepOf, signal: Tensor, noise: Tensor, expected: str
) -> tuple[Tensor, TimestepOf | None]:
    """The model's timesteps at these levels, float64 or int64 (n,) on the CPU; and `timestep` if it is a function.

    Args:
        timestep: the timesteps, or a function that returns them for levels.
        expected: the shape that a tensor `timestep` should have, for the error's text.

    Raises:
        TypeError: `timestep` is neither a tensor nor a function, or a function that returns no tensor.
        ValueError: a wrong shape, or no timesteps.
    """
    timestep_of = None if isinstance(timestep, Tensor) or not callable(timestep) else timestep
    values: Any = timestep if timestep_of is None else timesteps_by(timestep_of, signal, noise)
    checks.tensor("timestep", values)
    if values.shape != signal.shape or not len(values):
        raise ValueError(f"timestep has shape {tuple(values.shape)}, expected {expected}")
    dtype = torch.float64 if values.is_floating_point() else torch.int64
    return values.detach().to("cpu", dtype, copy=True), timestep_of


def power_share(signal: Tensor, noise: Tensor) -> Tensor:
    """alphas_cumprod of levels of signal and noise: signal^2 / (signal^2 + noise^2)."""
    return signal**2 / (signal**2 + noise**2)


def betas_between(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """1 - alphas_cumprod(before) / alphas_cumprod(after), without subtracting numbers near 1.

    Args:
        before, after: the levels (signal, noise) before and after a step of the reverse process. With None, `after` is
            the level one timestep lower, and clean data for timestep 0.
    """
    signal, noise = before
    if after is None:
        after = torch.cat([signal.new_ones(1), signal[:-1]]), torch.cat([noise.new_zeros(1), noise[:-1]])
    signal_after, noise_after = after
    return (noise**2 * signal_after**2 - noise_after**2 * signal**2) / ((signal**2 + noise**2) * signal_after**2)
