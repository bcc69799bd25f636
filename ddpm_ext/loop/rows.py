"""The rows of a sampling loop: the table that its options select, in the memory of the loop's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.loop.notes import check_notes, check_schedule
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.process.process import Process
from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.levels import pure_noise
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.row_needs import RowNeeds, row_needs
from ddpm_ext.tables.samplers import SAMPLERS, eta_argument, repaint
from ddpm_ext.tables.spacing import spaced_grid
from ddpm_ext.tables.step_table import StepTable

CACHED = 8  # the number of loops whose rows a GaussianDiffusion caches
Jumps = tuple[int, int]  # jump_length and jump_n_sample of RePaint's resampling


@dataclass(frozen=True, eq=False)
class LoopRows:
    """The rows of a loop's steps.

    Attributes:
        table: the rows as a StepTable.
        skipped: how many of the sampler's first steps the loop leaves out because of the option `strength`.
        device: the KernelTables with the rows, which hold a copy for each device.
        needs: what each row's step needs, such as a model call or noise, on the host.
        timesteps: the timestep of each row, on the host.
        variance: how the rows read the model's output for its variance: "log" if it determines the logarithm, "direct"
            if it is the variance itself, or None if they don't read it.
        learned: whether the model returns a variance besides its prediction.
        pure_noise: the standard deviation of the noise from which the loop starts.
    """

    table: StepTable
    skipped: int
    device: KernelTables
    needs: list[RowNeeds]
    timesteps: list[int | float]
    variance: str | None
    learned: bool
    pure_noise: float

    def __len__(self) -> int:
        return len(self.needs)

    @property
    def guided(self) -> bool:
        """Whether a row reads the unconditional output."""
        return any(needs.guided for needs in self.needs)

    def doubles(self, options: LoopOptions) -> bool:
        """Whether the model gets the batch twice in a guided step."""
        guide = options.guide
        return guide is not None and guide.unconditional is None and (guide.scale != 1 or self.guided)


# An entry also has the option `sampler`. If that is a StepTable, its id is in the cache key; without the reference,
# Python could free the table and give its id to a new one.
LoopRowsCache = BoundedCache[tuple[LoopRows, object]]


def checked_loop_rows(cache: LoopRowsCache, process: Process, options: LoopOptions) -> LoopRows:
    """cached_loop_rows(cache, process, options), with a warning for options that differ from the table's notes.

    Raises ValueError if inpaint or cond_fn needs columns that the table lacks, or if self_condition is given where the
    model gets the batch twice.
    """
    rows = cached_loop_rows(cache, process, options)
    check_notes(process, options)
    _check_rows(rows, options)
    return rows


def cached_loop_rows(cache: LoopRowsCache, process: Process, options: LoopOptions) -> LoopRows:
    """make_loop_rows(process, options), cached for the latest loops of the process.

    A second loop with the same options copies nothing to the device, so it can be captured in a CUDA graph.
    """
    return cache.get_or_make(_cache_key(options), lambda: (make_loop_rows(process, options), options.sampler))[0]


def _check_rows(rows: LoopRows, options: LoopOptions) -> None:
    """Raises ValueError if the table lacks what inpaint or cond_fn needs, or if self_condition is given where the model
    gets the batch twice.

    The model's input x would then have twice the batch size of the predicted x0 of self-conditioning.
    """
    table = rows.table
    if options.inpaint is not None and not bool((table.signal_after + table.noise_after).any()):
        raise ValueError(
            "inpaint is given, expected a sampler whose table has the levels signal_after and noise_after, where its "
            "steps arrive"
        )
    if options.cond_fn is not None and not bool((table.g0 != 0).any() | (table.g1 != 0).any()):
        raise ValueError("cond_fn is given, expected a sampler whose table says g0 or g1, a gradient's weights")
    if options.self_condition and rows.doubles(options):
        raise ValueError(
            "self_condition is True with guidance that has no function for the unconditional output, expected a "
            "Guidance that has one"
        )


def _cache_key(options: LoopOptions) -> object:
    """The cache key: the options that the rows depend on.

    It has the repr of numbers, since 1, 1.0 and True are equal but not all valid.
    """
    sampler = id(options.sampler) if isinstance(options.sampler, StepTable) else repr(options.sampler)
    guidance, timesteps = options.guide, options.timesteps
    if not (timesteps is None or isinstance(timesteps, Tensor)):
        try:
            timesteps = torch.as_tensor(timesteps, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # torch's errors for a dict, for ragged lists, for 2^70
            raise TypeError(f"timesteps is {options.timesteps!r}, expected ints (steps,), or int64") from None
    return (
        sampler,
        repr(options.eta),
        repr(options.steps),
        repr(options.spacing),
        repr(options.strength),
        None if timesteps is None else (timesteps.dtype, timesteps.shape, tuple(timesteps.flatten().tolist())),
        None if guidance is None else repr((guidance.scale, guidance.interval)),
        _jumps(options),
    )


def _jumps(options: LoopOptions) -> Jumps | None:
    """The jumps of RePaint's resampling, or None without resampling."""
    inpaint = options.inpaint
    return None if inpaint is None or inpaint.jump_n_sample == 1 else (inpaint.jump_length, inpaint.jump_n_sample)


def make_loop_rows(process: Process, options: LoopOptions) -> LoopRows:
    """The rows that a loop's options select.

    Raises:
        TypeError, ValueError: an option that is unknown, out of range, or does not fit the process.
    """
    guidance, jumps, learned = options.guide, _jumps(options), False
    if isinstance(options.sampler, StepTable):
        for name in ("steps", "spacing", "timesteps", "eta"):  # the table determines these
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name} is {value!r} with a StepTable as sampler, expected None")
        check_schedule(process, options.sampler.to("cpu"))
        skipped = _skipped(len(options.sampler), options.strength)
        table = options.sampler[skipped:]
    else:
        table, skipped = _sampler_table(process, options)
        learned = options.sampler == "ddpm" and process.variance_entry.learned
    table = table.to("cpu")
    if jumps is not None:
        table = repaint(table, jump_length=jumps[0], jump_n_sample=jumps[1])
    scales, unguided = torch.ones_like(table.a), torch.ones_like(table.a)
    if guidance is not None:
        is_guided = guidance.guides(table.timestep)
        scales[is_guided], unguided[is_guided] = float(guidance.scale), 0
    # Rows without guidance read the model's output as the unconditional output.
    table = replace(table, c2=table.c2 + unguided * table.cu, cu=(1 - unguided) * table.cu)
    needs, levels = row_needs(table, scales), _start_levels(process, table)
    _check_history(table, needs, skipped)
    device = KernelTables(table, scales, **({} if levels is None else {"start": levels}))
    deviation = 1.0 if levels is None else pure_noise(*levels[0].tolist())
    variance, timesteps = _variance_kind(process, table, learned), table.timestep.tolist()
    return LoopRows(table, skipped, device, needs, timesteps, variance, process.variance_entry.learned, deviation)


def _skipped(steps: int, strength: float) -> int:
    """The number of steps to leave out, so that the share `strength` remains. Raises ValueError if no step remains."""
    taken = int(steps * strength + 1e-9)  # 0.29 * 100 is 28.999999999999996, but means 29
    if taken == 0:
        raise ValueError(f"strength is {strength}, of {steps} steps not one, expected at least {1 / steps:.3g}")
    return steps - taken


def _sampler_table(process: Process, options: LoopOptions) -> tuple[StepTable, int]:
    """The rows of a named sampler without the first steps that `strength` leaves out, and how many it leaves out."""
    sampler = options.sampler
    if not isinstance(sampler, str):
        raise ValueError(f"sampler is {sampler!r}, expected a name such as 'ddpm' or 'dpmpp_2m', or a StepTable")
    any_step = process.prediction_entry.any_step
    arguments: dict[str, object] = {"prediction": process.prediction if any_step else "x0"}
    if sampler == "ddpm":
        arguments["variance"] = process.variance
    make = SAMPLERS[sampler]
    arguments |= eta_argument(make, options.eta)
    grid = _grid(process, options)
    table, skipped = make(grid, **arguments), _skipped(len(grid), options.strength)
    if skipped and len(table) == len(grid) and not table.history:
        table = table[skipped:]
    elif skipped:
        # If a step has several rows or reads history, the rows are made for the remaining steps only. The first of them
        # must not read history, so a sampler of higher order begins with order 1, like k-diffusion's with sigmas[k:].
        table = make(grid[skipped:], **arguments)
    return process.for_model(table if any_step else _for_schedule_steps(process, table)), skipped


def _for_schedule_steps(process: Process, table: StepTable) -> StepTable:
    """Converts rows for a model that predicts x0 to rows for the process's prediction, which is "x_prev".

    A model for "x_prev" predicts the mean after one step of the schedule, even if the loop takes larger steps.
    """
    t = table.timestep
    if t.is_floating_point():
        raise ValueError(
            f"prediction is {process.prediction!r}, expected a sampler and a spacing with the schedule's own timesteps"
        )
    x_factor, output_factor = (column[t] for column in process.prediction_entry.x0(process.levels))
    return replace(
        table,
        a=table.a + table.b * x_factor,
        b=table.b * output_factor,
        c1=table.c1 + (table.c2 + table.cu) * x_factor,
        c2=table.c2 * output_factor,
        cu=table.cu * output_factor,
    )


def _check_history(table: StepTable, needs: Sequence[RowNeeds], skipped: int) -> None:
    """Raises ValueError if a row reads a tensor of history that no earlier row of the loop keeps."""
    kept_count = 0
    for i, row in enumerate(needs):
        for slot, reads in enumerate(row.history, start=1):
            if reads and kept_count < slot:
                raise ValueError(
                    f"sampler's row {skipped + i} has h{slot} {getattr(table, f'h{slot}')[i]}, but {kept_count} rows "
                    "of the loop before it keep a tensor, expected 0"
                )
        kept_count += row.keeps


def _variance_kind(process: Process, table: StepTable, learned: bool) -> str | None:
    """LoopRows.variance: how the rows read the model's output for its variance, "log", "direct" or None.

    Args:
        learned: True if the rows are known to read it, as those of "ddpm" with a learned variance.
    """
    variance = process.variance_entry
    log = bool((table.l1 != 0).any())
    # In rows that read the variance itself, s is only the size of the samples, 1 where no levels are known.
    size = torch.hypot(table.signal_after, table.noise_after)
    is_size = (table.s - torch.where(size == 0, 1, size)).abs() <= 1e-12
    learned = learned or log or (variance.learned and not variance.logarithm and bool(is_size.any()))
    if log and not variance.logarithm:
        raise ValueError(
            f"sampler has rows for the logarithm of a model's own variance (l1), but the variance is "
            f"{process.variance!r}, expected 'learned' or 'learned_range'"
        )
    if not learned:
        return None
    return "log" if variance.logarithm else "direct"


def _start_levels(process: Process, table: StepTable) -> Tensor | None:
    """The signal and noise where each row starts, (rows, 2): the table's levels, or the schedule's at its timesteps.

    None if the table has no levels and its timesteps are not the schedule's.
    """
    levels = torch.stack([table.signal_now, table.noise_now], 1)
    if bool(levels.any()):
        return levels
    t = table.timestep
    in_schedule = process.schedule.timestep is None and not t.is_floating_point()
    in_schedule = in_schedule and bool(((t >= 0) & (t < process.timesteps)).all())
    return process.tables.get("q_sample", t.device, torch.float64)[t] if in_schedule else None


def _grid(process: Process, options: LoopOptions) -> Grid:
    """The timesteps and levels that a loop with these options visits, noisiest first."""
    steps, spacing = options.steps, options.spacing
    if options.timesteps is not None:
        if steps is not None or spacing is not None:
            raise ValueError(f"timesteps are given with steps={steps!r} and spacing={spacing!r}, expected both None")
        grid = process.scaled(make_grid(process.alphas_cumprod, options.timesteps, betas=process.betas))
        for now, after in pairwise(grid.timestep.tolist()):
            if after >= now:
                raise ValueError(f"timesteps do not descend from {now} to {after}, expected each below the one before")
        return grid
    return spaced_grid(process.alphas_cumprod, process.betas, steps, spacing, scale=process.schedule.scale)
