"""Spacings: rules, with names, for the timesteps that a sampler visits.

The spacings in this file choose among the timesteps of the schedule. Those in sigma_grids.py, and for flows in
flow_grids.py, also choose levels between the timesteps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.beta_quantile import beta_quantile
from ddpm_ext.tables.flow_grids import flow_spaced_grid
from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.levels import Scale, flow
from ddpm_ext.tables.names import find_name, nearest_names
from ddpm_ext.tables.sigma_grids import SIGMA_GRIDS

__all__ = ["DEFAULT_SPACING", "SPACINGS", "TIMESTEP_SPACINGS", "section_timesteps", "spaced_grid", "spaced_timesteps"]


def _linspace(timesteps: int, steps: int) -> Tensor:
    return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64, device="cpu").round().long()


def _leading(timesteps: int, steps: int) -> Tensor:
    return torch.arange(steps, device="cpu").flip(0) * (timesteps // steps)


def _trailing(timesteps: int, steps: int) -> Tensor:
    return (timesteps - torch.arange(steps, dtype=torch.float64, device="cpu") * (timesteps / steps)).round().long() - 1


def _quadratic(timesteps: int, steps: int) -> Tensor:
    ideal = (torch.linspace(0, (0.8 * timesteps) ** 0.5, steps, dtype=torch.float64, device="cpu") ** 2).long()
    return _distinct(ideal, timesteps).flip(0)


def _simple(timesteps: int, steps: int) -> Tensor:
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    return timesteps - 1 - (i * (timesteps / steps)).long()


def _beta(timesteps: int, steps: int) -> Tensor:
    share = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
    # Rounded, so that the median is exactly 1/2 and not the float below.
    ideal = beta_quantile(share, 0.6, 0.6).round(decimals=12) * (timesteps - 1)
    return _distinct(ideal.round().long(), timesteps).flip(0)


def _distinct(rising: Tensor, timesteps: int) -> Tensor:
    """Makes rising timesteps distinct: moves equal neighbours apart, as little as needed."""
    i = torch.arange(len(rising), device="cpu")
    return (rising - i).cummax(0).values.clamp(max=timesteps - len(rising)) + i


TIMESTEP_SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "quadratic": _quadratic,
    "simple": _simple,
    "beta": _beta,
}

# The spacing that None stands for. docs/developers/measurements.md has the measurements behind this choice.
DEFAULT_SPACING = "trailing"

# All names that `spacing=` takes. It also takes guided-diffusion's sections.
SPACINGS: Mapping[str, Callable[..., Any]] = {**TIMESTEP_SPACINGS, **SIGMA_GRIDS}
_SECTIONS = re.compile(r"ddim\d+|\d+(,\d+)*")


def _name_of_spacing(spacing: str, names: Collection[str]) -> str:
    """Finds `spacing` among `names`, in any spelling that find_name accepts. Raises ValueError for an unknown name."""
    name = find_name(spacing, names)
    if name is None:
        near = nearest_names(spacing, names)
        raise ValueError(
            f"spacing is {spacing!r}, expected a name such as {near}, 'ddimN' or counts with commas between"
        )
    return name


def spaced_timesteps(timesteps: int, steps: int | None = None, spacing: str | None = None) -> Tensor:
    """Some of the timesteps 0 to timesteps - 1, descending.

    Args:
        timesteps: the number of the schedule's timesteps.
        steps: the number of timesteps to take. None means all, or as many as `spacing` says.
        spacing: None means "trailing". If `steps` is `timesteps`, all names return the same. Lin et al. 2024, table 2,
            compare the first three.
            "linspace" is even, both ends included (one step: the last timestep).
            "leading" is even, up from 0.
            "trailing" is even, down from timesteps - 1.
            "quadratic" goes down from 0.8 timesteps, closer together towards 0 (Song et al. 2021, appendix D.2), made
            distinct (one step: timestep 0).
            "simple" is "trailing" with the rounding of k-diffusion and ComfyUI.
            "beta" is closer together towards both ends, at quantiles of a beta distribution with parameters 0.6 (Lee et
            al. 2024, "Beta Sampling is All You Need", and ComfyUI), made distinct.
            "ddim25" and the like, and counts of sections such as "10,15,20", are for section_timesteps.

    Returns:
        int64 (steps,) on the CPU.

    Raises:
        TypeError: `steps` is not an int, or `spacing` neither a string nor None.
        ValueError: `steps` is not in [1, timesteps], or not None although `spacing` determines the number; an unknown
            `spacing`; the errors of section_timesteps.

    Examples:
        >>> from ddpm_ext.tables.spacing import spaced_timesteps
        >>> spaced_timesteps(1000, 4, "trailing").tolist()
        [999, 749, 499, 249]
    """
    if spacing is None:
        spacing = DEFAULT_SPACING
    if not isinstance(spacing, str):
        raise TypeError(f"spacing is {spacing!r}, expected a string")
    if _SECTIONS.fullmatch(spacing):
        if steps is not None:
            raise ValueError(f"steps is {steps!r} with spacing {spacing!r}, expected None: the spacing says how many")
        sections: str | list[int] = spacing if spacing.startswith("ddim") else [int(n) for n in spacing.split(",")]
        return section_timesteps(timesteps, sections)
    spacing = _name_of_spacing(spacing, TIMESTEP_SPACINGS)
    if steps is None:
        steps = timesteps
    steps = checks.as_int("steps", steps)
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}, expected 1 to {timesteps}, the schedule's timesteps")
    return TIMESTEP_SPACINGS[spacing](timesteps, steps)


def section_timesteps(timesteps: int, sections: str | Sequence[int]) -> Tensor:
    """Timesteps as guided-diffusion chooses them (Nichol & Dhariwal 2021), descending.

    Args:
        timesteps: the number of the schedule's timesteps.
        sections: "ddimN" takes every k-th timestep from 0 on, with the k that takes N timesteps. A list has one count
            for each section. The sections divide the timesteps evenly. Each section contributes its count of timesteps,
            evenly spaced, both of the section's ends included; a count of 1 takes the section's lowest timestep.

    Returns:
        int64 on the CPU.

    Raises:
        ValueError: no k gives N, a section has fewer timesteps than its count, or a count is below 1.
    """
    if isinstance(sections, str):
        steps = int(sections.removeprefix("ddim"))
        for stride in range(1, timesteps + 1):
            if len(range(0, timesteps, stride)) == steps:
                return torch.arange(0, timesteps, stride, device="cpu").flip(0)
        raise ValueError(f"spacing is {sections!r}, but no stride takes {steps} of {timesteps} timesteps")
    size, longer = divmod(timesteps, len(sections))
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        length = size + (i < longer)
        if not 1 <= count <= length:
            raise ValueError(f"section {i} is to give {count} timesteps, expected 1 to {length}, which it has")
        gap, position = 1.0 if count == 1 else (length - 1) / (count - 1), 0.0
        # Positions are summed in floating point and rounded as guided-diffusion does it, so that a respaced model gets
        # the timesteps that it was evaluated with. Where a position is near a half, rounding errors of the sum decide.
        for _ in range(count):
            chosen.append(start + round(position))
            position += gap
        start += length
    return torch.tensor(chosen, dtype=torch.int64, device="cpu").flip(0)


def spaced_grid(
    alphas_cumprod: Tensor, betas: Tensor, steps: int | None, spacing: str | None = None, *, scale: Scale | None = None
) -> Grid:
    """The grid of a spacing by its name.

    Args:
        alphas_cumprod, betas: of the schedule, (timesteps,).
        scale: the samples' scale. SIGMA_GRIDS space levels by noise / signal, or for the scale `flow` by the flow's
            sigma.
        steps: the number of steps, or None: see spaced_timesteps.
        spacing: a name of SPACINGS; sections or None: see spaced_timesteps.

    Raises:
        TypeError, ValueError: the errors of spaced_timesteps; for a name of SIGMA_GRIDS, a schedule that this grid does
            not accept, `steps` is None, or for the scale `flow` a name that is not in FLOW_SPACINGS.

    Examples:
        >>> spaced_grid(gd.alphas_cumprod, gd.betas, 3, "leading").timestep.tolist()
        [666, 333, 0]
    """
    if isinstance(spacing, str) and not _SECTIONS.fullmatch(spacing):
        spacing = _name_of_spacing(spacing, SPACINGS)
    if isinstance(spacing, str) and spacing in SIGMA_GRIDS:
        if steps is None:
            raise ValueError(f"steps is None, expected a number of steps for spacing {spacing!r}")
        if scale is flow:
            return flow_spaced_grid(alphas_cumprod, steps, spacing)
        return replace(SIGMA_GRIDS[spacing](alphas_cumprod, steps), scale=scale)
    grid = make_grid(alphas_cumprod, spaced_timesteps(len(alphas_cumprod), steps, spacing), betas=betas)
    return replace(grid, scale=scale)
