"""The steps of a loop as numbers: its timesteps, and the level of signal and noise at each timestep.

At a timestep t of a schedule, alphas_cumprod[t] is the signal's share of the sample's power. If the power is not 1, a
Scale returns its square root: see ddpm_ext.tables.levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.levels import (
    LEVELS,
    Scale,
    TimestepOf,
    betas_between,
    checked_pairs,
    checked_timesteps,
    level_columns,
    power_share,
    straight,
    timesteps_by,
    unit_levels,
)

__all__ = ["Grid", "Jumps", "checked_levels", "grid_of_levels", "make_grid"]


@dataclass(frozen=True, eq=False)
class Grid:
    """The timesteps and levels of a loop's steps, in the loop's order.

    Attributes:
        timestep: int64 (rows,), or float64 if timesteps may be fractional.
        alphas_cumprod: float64 (rows + 1,), at each timestep. The last entry is the level where the last step arrives.
        betas: float64 (rows,), 1 - alphas_cumprod[i] / alphas_cumprod[i + 1]. For a step from a timestep of the
            schedule to the next lower one it is the schedule's beta, since the difference would lose digits.
        schedule: float64 (timesteps,), alphas_cumprod at all timesteps of the schedule, or None without a schedule.
        scale: the samples' scale, from which a level's signal and noise follow. None means 1 at all levels.
        timestep_of: the function that returns the model's timestep at a level between those of the grid. With None, the
            timestep is interpolated in `schedule`; if that is None too, samplers that need it raise ValueError.

    Examples:
        >>> grid.timestep.tolist()  # in the order of a loop; grid.alphas_cumprod has one level more
        [999, 499, 0]
    """

    timestep: Tensor
    alphas_cumprod: Tensor
    betas: Tensor
    schedule: Tensor | None = None
    scale: Scale | None = None
    timestep_of: TimestepOf | None = None

    def __len__(self) -> int:
        return len(self.timestep)

    def __getitem__(self, steps: slice) -> Grid:
        """The grid of the steps from the slice's start to its stop. Raises ValueError for a slice with a stride."""
        start, stop, stride = steps.indices(len(self))
        if stride != 1:
            raise ValueError(f"grid is sliced with a step of {stride}, expected none: each level leads to the next one")
        return replace(
            self,
            timestep=self.timestep[start:stop],
            alphas_cumprod=self.alphas_cumprod[start : stop + 1],
            betas=self.betas[start:stop],
        )

    def unscaled(self) -> Grid:
        """The same grid for variance-preserving samples: x divided by its scale."""
        timestep_of = None if self.timestep_of is None else self.timesteps_between
        return replace(self, scale=None, timestep_of=timestep_of)

    def timesteps_between(self, signal: Tensor, noise: Tensor) -> Tensor:
        """The model's timesteps at levels of variance-preserving samples: signal^2 + noise^2 = 1, (n,) each."""
        assert self.timestep_of is not None
        return timesteps_by(self.timestep_of, *self._scaled(signal, noise))

    def _scaled(self, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale is None:
            return signal, noise
        r = self.scale(signal, noise)
        return signal * r, noise * r

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Signal and noise at each level, (rows + 1,) each."""
        return self._scaled(*unit_levels(self.alphas_cumprod))

    @property
    def levels(self) -> dict[str, Tensor]:
        """Signal and noise where each step starts and where it arrives, as columns of a StepTable, (rows,) each."""
        signal, noise = self.pairs
        return dict(zip(LEVELS, (signal[:-1], noise[:-1], signal[1:], noise[1:]), strict=True))

    @property
    def now(self) -> Tensor:
        """alphas_cumprod where each step starts, (rows,)."""
        return self.alphas_cumprod[:-1]

    @property
    def alphas(self) -> Tensor:
        """alphas_cumprod where each step starts divided by alphas_cumprod where it arrives, (rows,): 1 - betas."""
        return 1 - self.betas

    @property
    def after(self) -> Tensor:
        """alphas_cumprod where each step arrives, (rows,)."""
        return self.alphas_cumprod[1:]


@dataclass(frozen=True, eq=False)
class Jumps:
    """Steps that need not be consecutive: a step may start at another level than the one where the previous step ends.
    None of them counts as the last step of a process.

    Samplers annotated with `Grid | Jumps`, such as ddim, take Jumps in place of a Grid; attributes of both have the
    same meaning.

    Attributes:
        timestep: int64 (rows,).
        now, after: float64 (rows,), alphas_cumprod where each step starts and where it arrives.
        alphas: float64 (rows,), now / after.
    """

    timestep: Tensor
    now: Tensor
    after: Tensor
    alphas: Tensor
    scale: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def levels(self) -> dict[str, Tensor]:
        """Signal and noise where each step starts and where it arrives, as columns of a StepTable, (rows,) each."""
        return level_columns(self.now, self.after)

    @property
    def betas(self) -> Tensor:
        """The beta of each step, (rows,): 1 - alphas."""
        return 1 - self.alphas


def checked_levels(alphas_cumprod: Tensor) -> Tensor:
    """alphas_cumprod, checked, as float64 (timesteps,) on the CPU, in [0, 1]."""
    levels = checks.floats("alphas_cumprod", alphas_cumprod, "(timesteps,)")
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"alphas_cumprod reaches from {levels.min()} to {levels.max()}, expected all in [0, 1]")
    return levels


def make_grid(
    alphas_cumprod: Tensor, timestep: Tensor | Sequence[int], *, betas: Tensor | None = None, final: float = 1.0
) -> Grid:
    """The grid of some timesteps of a schedule.

    Args:
        alphas_cumprod: (timesteps,), in [0, 1].
        timestep: int64 (rows,), in the loop's order. It descends, unless the loop goes up.
        betas: the schedule's betas, (timesteps,), for steps of one timestep. The betas of longer steps, and with None
            of all steps, are computed from alphas_cumprod.
        final: alphas_cumprod where the last step arrives, 1 for clean data. diffusers ends at alphas_cumprod[0] where
            set_alpha_to_one is off.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a timestep out of range, the same timestep twice in a row, a number outside of [0, 1], or a wrong
            shape.

    Examples:
        >>> from ddpm_ext.tables.grid import make_grid
        >>> from ddpm_ext.tables.samplers import ddim
        >>> table = ddim(make_grid(GaussianDiffusion(1000).alphas_cumprod, [999, 500, 0]))
    """
    levels = checked_levels(alphas_cumprod)
    chosen = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep, device="cpu")
    if chosen.dim() != 1 or len(chosen) == 0:
        raise ValueError(f"timestep has shape {tuple(chosen.shape)}, expected (rows,) with a row at least")
    if chosen.dtype != torch.int64:
        raise TypeError(f"timestep has dtype {chosen.dtype}, expected int64")
    chosen = chosen.detach().to("cpu", copy=True)
    if not ((chosen >= 0) & (chosen < len(levels))).all():
        raise ValueError(
            f"timestep reaches from {chosen.min()} to {chosen.max()}, expected all in 0 <= timestep < {len(levels)}"
        )
    for repeated in chosen[1:][chosen[1:] == chosen[:-1]].tolist():
        raise ValueError(f"timestep has the same timestep twice in a row, {repeated}, expected a step between two")
    if not 0 <= final <= 1:
        raise ValueError(f"final is {final}, expected 0 <= final <= 1")
    loop_levels = torch.cat([levels[chosen], levels.new_tensor([final])])
    loop_betas = 1 - loop_levels[:-1] / loop_levels[1:]
    if betas is not None:
        betas = betas.detach().to("cpu", torch.float64)
        if betas.shape != levels.shape:
            raise ValueError(f"betas have shape {tuple(betas.shape)}, expected that of alphas_cumprod")
        next_timestep = torch.cat([chosen[1:], chosen.new_tensor([-1 if final == 1 else len(levels)])])
        loop_betas = torch.where(chosen - next_timestep == 1, betas[chosen], loop_betas)
    return Grid(chosen, loop_levels, loop_betas, levels)


def grid_of_levels(timestep: Tensor | TimestepOf, signal: Tensor, noise: Tensor, *, scale: Scale | None = None) -> Grid:
    """The grid of these levels, without a schedule.

    For example, the grid of k-diffusion's sigmas is grid_of_levels(timestep, torch.ones_like(sigmas), sigmas), and the
    grid of diffusers' flow matching is grid_of_levels(timestep, 1 - sigmas, sigmas).

    Args:
        timestep: (rows,), the timestep that the model is called with in each step, int64 or floating. Or a function of
            signal and noise, float64 (n,) each, that returns the timesteps of any levels, floating (n,). Samplers that
            call the model between the grid's levels need the function: for flow matching, lambda signal, noise:
            1000 * noise.
        signal, noise: (rows + 1,), finite, at least 0, the level where each step starts. The last entry is where the
            last step arrives.
        scale: the samples' scale at levels between those of the grid. With None, levels lie on the straight line
            through the two nearest levels of the grid.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, numbers out of range, or the same ratio of signal and noise twice in a row.

    Examples:
        >>> sigmas = torch.tensor([1.0, 0.9, 0.5, 0.0], dtype=torch.float64)
        >>> flow = grid_of_levels(lambda signal, noise: 1000 * noise, signal=1 - sigmas, noise=sigmas)
    """
    signal, noise = checked_pairs(signal, noise)
    expected = f"({len(signal) - 1},), one less than there are levels"
    chosen, timestep_of = checked_timesteps(timestep, signal[:-1], noise[:-1], expected)
    loop_levels = power_share(signal, noise)
    if (loop_levels[1:] == loop_levels[:-1]).any():
        raise ValueError("signal and noise have the same ratio twice in a row, expected a step between two levels")
    if scale is None:
        _, order = np.unique(-loop_levels.numpy(), return_index=True)
        scale = partial(straight, nodes=(signal[order], noise[order]))
    betas = betas_between((signal[:-1], noise[:-1]), (signal[1:], noise[1:]))
    return Grid(chosen, loop_levels, betas, scale=scale, timestep_of=timestep_of)
