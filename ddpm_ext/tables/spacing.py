"""Which timesteps a sampler visits, and how much of the signal is left at each.

At a timestep t of a schedule, alphas_cumprod[t] of the signal's power is left. sigma = sqrt(1 / alphas_cumprod - 1) is
the standard deviation of the noise for a signal of scale 1, as in Karras et al. 2022.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.timestep_at import timestep_at

__all__ = [
    "SIGMA_GRIDS",
    "SPACINGS",
    "Grid",
    "Jumps",
    "karras_grid",
    "karras_sigmas",
    "log_snr_grid",
    "make_grid",
    "section_timesteps",
    "spaced_grid",
    "spaced_timesteps",
]


@dataclass(frozen=True, eq=False)
class Grid:
    """The timesteps of a loop, in its order.

    Attributes:
        timestep: int64 (rows,), or float64 where they lie between the schedule's own.
        alphas_cumprod: float64 (rows + 1,), at each timestep, and last where the last step arrives.
        betas: float64 (rows,), 1 - alphas_cumprod[i] / alphas_cumprod[i + 1]; between neighbouring timesteps the
            schedule's own beta, of which that difference would lose digits.
        schedule: float64 (timesteps,), alphas_cumprod at all timesteps of the schedule; None where there is none.
    """

    timestep: Tensor
    alphas_cumprod: Tensor
    betas: Tensor
    schedule: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timestep)

    def __getitem__(self, steps: slice) -> Grid:
        """The grid of the steps from the slice's start to its stop."""
        start, stop, _ = steps.indices(len(self))
        levels = self.alphas_cumprod[start : stop + 1]
        return Grid(self.timestep[start:stop], levels, self.betas[start:stop], self.schedule)

    @property
    def now(self) -> Tensor:
        """alphas_cumprod where each step starts, (rows,)."""
        return self.alphas_cumprod[:-1]

    @property
    def alphas(self) -> Tensor:
        """1 - betas"""
        return 1 - self.betas

    @property
    def after(self) -> Tensor:
        """alphas_cumprod where each step arrives, (rows,)."""
        return self.alphas_cumprod[1:]


@dataclass(frozen=True, eq=False)
class Jumps:
    """Steps that need not follow one on another, none of which is the last step of a process.

    A sampler of first order takes them instead of a Grid; the attributes have the same meaning.

    Attributes:
        timestep: int64 (rows,).
        now, after: float64 (rows,), alphas_cumprod where each step starts and where it arrives.
        alphas: float64 (rows,), now / after.
    """

    timestep: Tensor
    now: Tensor
    after: Tensor
    alphas: Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def betas(self) -> Tensor:
        """1 - alphas"""
        return 1 - self.alphas


# ------------------------------------------------------------------------------------------------ whole timesteps


def _linspace(timesteps: int, steps: int) -> Tensor:
    if steps == 1:
        return torch.tensor([timesteps - 1], device="cpu")
    return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64, device="cpu").round().long()


def _leading(timesteps: int, steps: int) -> Tensor:
    return torch.arange(steps, device="cpu").flip(0) * (timesteps // steps)


def _trailing(timesteps: int, steps: int) -> Tensor:
    return (timesteps - torch.arange(steps, dtype=torch.float64, device="cpu") * (timesteps / steps)).round().long() - 1


def _quadratic(timesteps: int, steps: int) -> Tensor:
    i = torch.arange(steps, device="cpu")
    ideal = (torch.linspace(0, (0.8 * timesteps) ** 0.5, steps, dtype=torch.float64, device="cpu") ** 2).long()
    return ((ideal - i).cummax(0).values + i).flip(0)  # no timestep comes twice


SPACINGS = {"linspace": _linspace, "leading": _leading, "trailing": _trailing, "quadratic": _quadratic}


def spaced_timesteps(timesteps: int, steps: int | None = None, spacing: str = "linspace") -> Tensor:
    """Some of the timesteps 0 to timesteps - 1, descending.

    Args:
        timesteps: how many the schedule has.
        steps: how many to take; None: all, or as many as `spacing` says.
        spacing: "linspace", evenly with both ends (one step: the last); "leading", evenly up from 0; "trailing", evenly
            down from timesteps - 1 (Lin et al. 2023, table 2, has the three); "quadratic", down from 0.8 timesteps and
            closer together towards 0 (Song et al. 2021, appendix D.2), but none twice; "ddim25" and the like, or counts
            of sections as "10,15,20": see section_timesteps.

    Returns:
        int64 (steps,) on the CPU.

    Raises:
        TypeError: `steps` is not an int, or `spacing` not a string.
        ValueError: `steps` is not in [1, timesteps], or is given with a spacing that says how many; an unknown
            `spacing`.
    """
    if not isinstance(spacing, str):
        raise TypeError(f"spacing is {spacing!r}, expected a string")
    if re.fullmatch(r"ddim\d+|\d+(,\d+)*", spacing):
        if steps is not None:
            raise ValueError(f"steps is {steps!r} beside spacing {spacing!r}, which says how many, expected None")
        sections: str | list[int] = spacing if spacing.startswith("ddim") else [int(n) for n in spacing.split(",")]
        return section_timesteps(timesteps, sections)
    if spacing not in SPACINGS:
        names = ", ".join(repr(name) for name in SPACINGS)
        raise ValueError(f"spacing is {spacing!r}, expected {names}, 'ddimN' or counts with commas between")
    if steps is None:
        steps = timesteps
    stop_name = f"{timesteps + 1}, there being {timesteps} timesteps"
    steps = checks.integer("steps", steps, timesteps + 1, stop_name, start=1)
    return SPACINGS[spacing](timesteps, steps)


def section_timesteps(timesteps: int, sections: str | Sequence[int]) -> Tensor:
    """Timesteps as guided-diffusion chooses them (Nichol & Dhariwal 2021), descending.

    Args:
        timesteps: how many the schedule has.
        sections: "ddimN" for every k-th timestep from 0 on, with the k that gives N of them; or a list of counts, one
            for each section. The sections divide the timesteps evenly, and each gives its count, evenly with both ends.

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
    taken: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        length = size + (i < longer)
        if not 1 <= count <= length:
            raise ValueError(f"section {i} is to give {count} timesteps, expected 1 to {length}, which it has")
        gap, position = 1.0 if count == 1 else (length - 1) / (count - 1), 0.0
        # Added up in floating point and rounded as guided-diffusion does, so that a respaced model gets the timesteps
        # that it was evaluated with: where a position is near a half, the sum decides.
        for _ in range(count):
            taken.append(start + round(position))
            position += gap
        start += length
    return torch.tensor(taken, dtype=torch.int64, device="cpu").flip(0)


# ----------------------------------------------------------------------------------------------------------- grids


def _levels(alphas_cumprod: Tensor) -> Tensor:
    """alphas_cumprod, checked, as float64 (timesteps,) on the CPU, in [0, 1]."""
    checks.tensor("alphas_cumprod", alphas_cumprod)
    if not alphas_cumprod.is_floating_point():
        raise TypeError(f"alphas_cumprod has dtype {alphas_cumprod.dtype}, expected a floating one")
    if alphas_cumprod.dim() != 1 or len(alphas_cumprod) == 0:
        raise ValueError(f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)}, expected (timesteps,)")
    levels = alphas_cumprod.detach().to("cpu", torch.float64)
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"alphas_cumprod reaches from {levels.min()} to {levels.max()}, expected all in [0, 1]")
    return levels


def make_grid(
    alphas_cumprod: Tensor, timestep: Tensor | Sequence[int], *, betas: Tensor | None = None, final: float = 1.0
) -> Grid:
    """A grid of some of a schedule's own timesteps.

    Args:
        alphas_cumprod: (timesteps,), in [0, 1].
        timestep: int64 (rows,), in the loop's order: descending, unless the loop goes up.
        betas: the schedule's, (timesteps,); None: from alphas_cumprod.
        final: alphas_cumprod where the last step arrives: 1 for clean data; diffusers ends at alphas_cumprod[0] where
            set_alpha_to_one is off.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a timestep out of range or twice in a row, numbers out of [0, 1], or betas of another length.
    """
    levels = _levels(alphas_cumprod)
    chosen = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep, device="cpu")
    if chosen.dtype != torch.int64:
        raise TypeError(f"timestep has dtype {chosen.dtype}, expected int64")
    chosen = chosen.detach().to("cpu", copy=True)
    if chosen.dim() != 1 or len(chosen) == 0:
        raise ValueError(f"timestep has shape {tuple(chosen.shape)}, expected (rows,) with a row at least")
    if not ((chosen >= 0) & (chosen < len(levels))).all():
        raise ValueError(
            f"timestep reaches from {chosen.min()} to {chosen.max()}, expected all in 0 <= timestep < {len(levels)}"
        )
    if (chosen[1:] == chosen[:-1]).any():
        raise ValueError("timestep has the same timestep twice in a row, expected a step between two")
    if not 0 <= final <= 1:
        raise ValueError(f"final is {final}, expected 0 <= final <= 1")
    path = torch.cat([levels[chosen], levels.new_tensor([final])])
    jumps = 1 - path[:-1] / path[1:]
    if betas is not None:
        betas = betas.detach().to("cpu", torch.float64)
        if betas.shape != levels.shape:
            raise ValueError(f"betas have shape {tuple(betas.shape)}, expected that of alphas_cumprod")
        below = torch.cat([chosen[1:], chosen.new_tensor([-1 if final == 1 else len(levels)])])
        jumps = torch.where(chosen - below == 1, betas[chosen], jumps)
    return Grid(chosen, path, jumps, levels)


def _sigma_grid(alphas_cumprod: Tensor, sigma: Tensor, final: float) -> Grid:
    """The grid of descending sigmas, with timesteps by interpolation in log sigma."""
    levels = _levels(alphas_cumprod)
    timestep = timestep_at(levels, sigma)
    path = torch.cat([1 / (1 + sigma**2), levels.new_tensor([final])])
    return Grid(timestep, path, 1 - path[:-1] / path[1:], levels)


def _sigma_range(alphas_cumprod: Tensor, steps: int) -> tuple[float, float]:
    """The schedule's greatest and least sigma, once `steps` and the schedule have been checked."""
    levels = _levels(alphas_cumprod)
    checks.integer("steps", steps, 2**31, "2^31", start=1)
    if len(levels) < 2 or not (levels[1:] < levels[:-1]).all():
        raise ValueError("alphas_cumprod does not fall from timestep to timestep, expected a falling one")
    if levels[-1] == 0 or levels[0] == 1:
        raise ValueError("alphas_cumprod reaches 0 or 1, where sigma is infinite or 0: expected all in between")
    greatest, least = (1 / levels[[-1, 0]] - 1).sqrt().tolist()
    return greatest, least


def karras_sigmas(greatest: float, least: float, steps: int, rho: float = 7.0) -> Tensor:
    """Evenly spaced in sigma^(1/rho), with both ends: Karras et al. 2022, eq. (5). float64 (steps,)."""
    if not rho > 0:
        raise ValueError(f"rho is {rho}, expected rho > 0")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    return (greatest ** (1 / rho) * (1 - ramp) + least ** (1 / rho) * ramp) ** rho


def karras_grid(alphas_cumprod: Tensor, steps: int, *, rho: float = 7.0, final: float = 1.0) -> Grid:
    """Sigmas evenly spaced in sigma^(1/rho), from the schedule's greatest to its least: Karras et al. 2022, eq. (5).

    Args:
        alphas_cumprod: (timesteps,), falling, in (0, 1).
        steps: how many, at least 1.
        rho: above 0. The greater it is, the more steps are at low noise.
        final: alphas_cumprod where the last step arrives.

    Returns:
        A Grid whose timesteps are float64, between the schedule's own.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.
    """
    greatest, least = _sigma_range(alphas_cumprod, steps)
    return _sigma_grid(alphas_cumprod, karras_sigmas(greatest, least, steps, rho), final)


def log_snr_grid(alphas_cumprod: Tensor, steps: int, *, final: float = 1.0) -> Grid:
    """Sigmas evenly spaced in log sigma, minus half the log of the signal-to-noise ratio: Lu et al. 2022, section 3.

    Args, returns, raises: as for karras_grid.
    """
    greatest, least = _sigma_range(alphas_cumprod, steps)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    first, last = (torch.tensor(sigma, device="cpu").double().log() for sigma in (greatest, least))
    sigma = torch.exp(first * (1 - ramp) + last * ramp)
    return _sigma_grid(alphas_cumprod, sigma, final)


# By the names that `spacing=` takes, beside those of spaced_timesteps.
SIGMA_GRIDS = {"karras": karras_grid, "log_snr": log_snr_grid}


def spaced_grid(alphas_cumprod: Tensor, betas: Tensor, steps: int | None, spacing: str) -> Grid:
    """The grid of a spacing by its name.

    Args:
        alphas_cumprod, betas: the schedule's, (timesteps,).
        steps: how many; None: as for spaced_timesteps.
        spacing: a name of SIGMA_GRIDS, or as for spaced_timesteps.

    Raises:
        TypeError, ValueError: as spaced_timesteps; a schedule that SIGMA_GRIDS do not take, or no `steps` for them.
    """
    if isinstance(spacing, str) and spacing in SIGMA_GRIDS:
        if steps is None:
            raise ValueError(f"steps is None, expected a number of steps for spacing {spacing!r}")
        return SIGMA_GRIDS[spacing](alphas_cumprod, steps)
    return make_grid(alphas_cumprod, spaced_timesteps(len(alphas_cumprod), steps, spacing), betas=betas)
