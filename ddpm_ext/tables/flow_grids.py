"""Grids for flows, whose samples are (1 - sigma) x_0 + sigma noise, with sigma from 1 down to 0.

A shift moves the sigmas of a flow's steps towards noise; larger images need a larger shift. A stretch gives the last
sigma a chosen value. flow_sigmas does both, in the order of diffusers' FlowMatchEulerDiscreteScheduler.
`linear_quadratic` of ddpm_ext.tables.sigma_grids also returns sigmas for flow_grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid, checked_levels, grid_of_levels
from ddpm_ext.tables.levels import flow, flow_timestep, unit_levels
from ddpm_ext.tables.sigma_grids import beta_sigmas, exponential_sigmas, karras_sigmas, linear_quadratic

__all__ = [
    "FLOW_SPACINGS",
    "SIGMA_CURVES",
    "flow_grid",
    "flow_shift",
    "flow_sigmas",
    "flow_spaced_grid",
    "resolution_mu",
    "stretched",
]

# The keys are named after diffusers' options use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas.
SIGMA_CURVES: dict[str, Callable[[float, float, int], Tensor]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
}

# The keys are the names that `spacing=` takes for a flow, in addition to the names of spaced_timesteps.
FLOW_SPACINGS: dict[str, Callable[[float, float, int], Tensor]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta_sigmas": beta_sigmas,
    "sgm_uniform": lambda greatest, least, steps: _evenly_spaced(greatest, least, steps + 1)[:-1],
    "linear_quadratic": lambda greatest, least, steps: greatest * linear_quadratic(steps),
}


def _evenly_spaced(greatest: float, least: float, steps: int) -> Tensor:
    return torch.linspace(greatest, least, steps, dtype=torch.float64, device="cpu")


def flow_shift(sigma: Tensor, shift: float) -> Tensor:
    """shift sigma / (1 + (shift - 1) sigma): Esser et al. 2024, eq. (23).

    This multiplies sigma / (1 - sigma) by `shift`.

    Args:
        sigma: of any shape, floating, in [0, 1].
        shift: above 0. A shift above 1 gives more noise. Flux states mu, the logarithm of the shift.

    Examples:
        >>> flow_shift(torch.tensor([0.75, 0.5, 0.25]), 3.0)
        tensor([0.9000, 0.7500, 0.5000])
    """
    if not checks.finite("shift", shift) > 0:
        raise ValueError(f"shift is {shift}, expected shift > 0")
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_mu(
    tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base_mu: float = 0.5, max_mu: float = 1.15
) -> float:
    """Flux's mu, the logarithm of the shift, for an image of `tokens` tokens: linear in the number of tokens.

    Args:
        tokens: how many tokens the transformer gets, at least 1. With patches of 2 by 2 this is the latents' height
            times their width, over 4.
        base_tokens, base_mu, max_tokens, max_mu: the two points (tokens, mu) through which the line goes.

    Examples:
        >>> resolution_mu(4096)  # 64 by 64 patches: an image of 1024 by 1024
        1.15
    """
    checks.integer("tokens", tokens, 2**53, "2^53", start=1)
    return base_mu + (max_mu - base_mu) * (tokens - base_tokens) / (max_tokens - base_tokens)


def stretched(sigma: Tensor, terminal: float) -> Tensor:
    """The sigmas with 1 - sigma scaled by one factor, so that the last sigma becomes `terminal`: LTX-Video's stretch.

    Args:
        sigma: (steps,), falling, in (0, 1], the last below 1.
        terminal: in (0, 1).

    Raises:
        TypeError, ValueError: `terminal` is not a number, or out of range; the last sigma is 1.
    """
    checks.tensor("sigma", sigma)
    if not 0 < checks.finite("terminal", terminal) < 1:
        raise ValueError(f"terminal is {terminal}, expected 0 < terminal < 1")
    if sigma[-1] >= 1:
        raise ValueError(f"sigma ends at {sigma[-1]}, expected less than 1, of which `terminal` can be made")
    return 1 - (1 - sigma) * ((1 - terminal) / (1 - sigma[-1]))


def flow_sigmas(
    steps: int,
    *,
    least: float | None = None,
    shift: float = 1.0,
    mu: float | None = None,
    terminal: float | None = None,
    curve: str | None = None,
) -> Tensor:
    """The sigmas at which the steps of a flow's loop start.

    Args:
        steps: the number of steps, at least 1.
        least: the smallest sigma before the other options change the sigmas, in (0, 1]. Until then they are evenly
            spaced from 1 down to `least`. None means 1 / steps, as in Flux's pipeline. diffusers'
            FlowMatchEulerDiscreteScheduler uses flow_shift(1 / timesteps, shift) unless the caller passes sigmas; with
            use_dynamic_shifting it uses 1 / timesteps.
        shift: see flow_shift.
        mu: the logarithm of the shift, as diffusers' use_dynamic_shifting takes it. With mu, `shift` must be 1. With
            diffusers' time_shift_type "linear", mu is the shift itself, to pass as `shift`.
        terminal: the value that `stretched` gives the last sigma. None means no stretch.
        curve: a name of SIGMA_CURVES. The sigmas follow this curve from the first to the last. None means no curve.

    Returns:
        float64 (steps,) on the CPU, falling, the first 1.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> flow_sigmas(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000], dtype=torch.float64)
    """
    checks.integer("steps", steps, 2**31, "2^31", start=1)
    if least is not None and not 0 < checks.finite("least", least) <= 1:
        raise ValueError(f"least is {least}, expected 0 < least <= 1")
    if mu is not None:
        if shift != 1:
            raise ValueError(f"mu is {mu} with shift {shift}, expected one of the two")
        shift = math.exp(checks.finite("mu", mu))
    sigma = flow_shift(_evenly_spaced(1, 1 / steps if least is None else least, steps), shift)
    if terminal is not None:
        sigma = stretched(sigma, terminal)
    if curve is not None:
        sigma = SIGMA_CURVES[checks.one_of("curve", curve, SIGMA_CURVES)](sigma[0].item(), sigma[-1].item(), steps)
    return sigma


def flow_grid(sigma: Tensor, *, timesteps: int = 1000, final: float = 0.0) -> Grid:
    """The grid of a flow's sigmas. The model is called with timesteps * sigma, also between the grid's sigmas.

    Args:
        sigma: (steps,), falling, in (0, 1], the sigma at which each step starts.
        timesteps: the factor of sigma in the model's timestep, at least 1.
        final: the sigma at which the last step arrives, at least 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or dtype, or is out of range.

    Examples:
        >>> from ddpm_ext.tables.flow_grids import flow_sigmas
        >>> flow_grid(flow_sigmas(4, shift=3.0)).timestep.tolist()
        [1000.0, 900.0, 750.0, 500.0]
    """
    levels = checks.floats("sigma", sigma, "(steps,)")
    checks.integer("timesteps", timesteps, 2**31, "2^31", start=1)
    path = torch.cat([levels, levels.new_tensor([final])])
    if not (path[0] <= 1 and (path[1:] < path[:-1]).all() and final >= 0):
        raise ValueError(f"sigma and final are {path.tolist()}, expected falling numbers from 1 to 0")
    return grid_of_levels(partial(flow_timestep, timesteps=timesteps), 1 - path, path, scale=flow)


def flow_spaced_grid(alphas_cumprod: Tensor, steps: int, spacing: str) -> Grid:
    """The grid of a spacing of sigmas for a flow, from the schedule's largest sigma down to 0.

    Args:
        alphas_cumprod: (timesteps,), falling, of the schedule's variance-preserving samples x / r
            (ddpm_ext.tables.levels).
        steps: the number of steps, at least 1.
        spacing: a name of FLOW_SPACINGS. "karras", "exponential" and "beta_sigmas" are use_karras_sigmas,
            use_exponential_sigmas and use_beta_sigmas of diffusers' FlowMatchEulerDiscreteScheduler; the last of two or
            more steps starts at the schedule's smallest sigma. "sgm_uniform" and "linear_quadratic" are ComfyUI's.

    Returns:
        A Grid with float64 timesteps, which may lie between the timesteps of the schedule.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.
    """
    schedule = checked_levels(alphas_cumprod)
    checks.integer("steps", steps, 2**31, "2^31", start=1)
    if spacing not in FLOW_SPACINGS:
        names = ", ".join(repr(name) for name in FLOW_SPACINGS)
        raise ValueError(f"spacing is {spacing!r}, expected for a flow {names}, or timesteps of its schedule")
    signal, noise = unit_levels(schedule)
    schedule_sigma = noise / (signal + noise)
    sigma = FLOW_SPACINGS[spacing](schedule_sigma[-1].item(), schedule_sigma[0].item(), steps)
    timestep = np.interp(sigma.numpy(), schedule_sigma.numpy(), np.arange(len(schedule_sigma)))
    return replace(flow_grid(sigma), timestep=torch.from_numpy(timestep), schedule=schedule, timestep_of=None)
