"""The rows of a sampling loop: the table that its options choose, on the devices where the loop runs."""

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

CACHED = 8  # loops whose rows a GaussianDiffusion holds
Jumps = tuple[int, int]  # jump_length and jump_n_sample of RePaint's resampling


@dataclass(frozen=True, eq=False)
class LoopRows:
    """The rows of the steps that a loop takes.

    table: as a StepTable. skipped: how many of the sampler's steps come before them, where the loop begins later than
    with the first. device: for the kernels. needs, timesteps: of each row, on the host. variance: how the rows
    read the model's variance output, "log" or "direct"; None where they don't. learned: whether the model returns one
    beside its prediction. pure_noise: the standard deviation of drawn samples to begin from.
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
        """Whether the model gets the batch twice, at a guided step."""
        guide = options.guide
        return guide is not None and guide.unconditional is None and (guide.scale != 1 or self.guided)


# Each entry holds its sampler, so that no other StepTable gets its id.
LoopRowsCache = BoundedCache[tuple[LoopRows, object]]


def checked_loop_rows(cache: LoopRowsCache, process: Process, options: LoopOptions) -> LoopRows:
    """kept_loop_rows, after a check that they have what the options need."""
    rows = kept_loop_rows(cache, process, options)
    check_notes(process, options)
    _check_rows(rows, options)
    return rows


def kept_loop_rows(cache: LoopRowsCache, process: Process, options: LoopOptions) -> LoopRows:
    """make_loop_rows(process, options), made once for the last few loops of the process, whose cache it is: a second
    loop copies nothing to the device, and so can be captured in a CUDA graph."""
    return cache.get_or_make(_key(options), lambda: (make_loop_rows(process, options), options.sampler))[0]


def _check_rows(rows: LoopRows, options: LoopOptions) -> None:
    """That the table has what the options need."""
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
            "self_condition is given beside guidance without a function for the unconditional output, expected a "
            "Guidance that has one"
        )


def _key(options: LoopOptions) -> object:
    """What the rows depend on, by more than equality: 1.0 and True must not pass for the 1 of an earlier loop."""
    sampler = id(options.sampler) if isinstance(options.sampler, StepTable) else repr(options.sampler)
    guidance, timesteps = options.guide, options.timesteps
    if not (timesteps is None or isinstance(timesteps, Tensor)):
        try:
            timesteps = torch.as_tensor(timesteps, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # what torch says of a dict, of lists of two lengths, of 2^70
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
    inpaint = options.inpaint
    return None if inpaint is None or inpaint.jump_n_sample == 1 else (inpaint.jump_length, inpaint.jump_n_sample)


def make_loop_rows(process: Process, options: LoopOptions) -> LoopRows:
    """The rows that a loop's options choose.

    Raises:
        TypeError, ValueError: an option that is unknown, out of range, or does not fit the process.
    """
    guidance, jumps, learned = options.guide, _jumps(options), False
    if isinstance(options.sampler, StepTable):
        for name in ("steps", "spacing", "timesteps", "eta"):  # a table says all that these would
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name} is {value!r} beside a StepTable as sampler, expected the table alone")
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
        guides = guidance.guides(table.timestep)
        scales[guides], unguided[guides] = float(guidance.scale), 0
    # Where there is no guidance, the unconditional output is the output.
    table = replace(table, c2=table.c2 + unguided * table.cu, cu=(1 - unguided) * table.cu)
    needs, levels = row_needs(table, scales), _levels(process, table)
    _check_history(table, needs, skipped)
    device = KernelTables(table, scales, **({} if levels is None else {"start": levels}))
    start = 1.0 if levels is None else pure_noise(*levels[0].tolist())
    variance, timesteps = _variance(process, table, learned), table.timestep.tolist()
    return LoopRows(table, skipped, device, needs, timesteps, variance, process.variance_entry.learned, start)


def _skipped(steps: int, strength: float) -> int:
    """How many steps come before the last `strength` of them."""
    taken = int(steps * strength + 1e-9)  # 0.29 of 100 is 29
    if taken == 0:
        raise ValueError(f"strength is {strength}, of {steps} steps not one, expected at least {1 / steps:.3g}")
    return steps - taken


def _sampler_table(process: Process, options: LoopOptions) -> tuple[StepTable, int]:
    """The rows that the loop takes of a sampler by its name, and how many of its steps come before."""
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
        # A sampler of higher order begins at first order, as k-diffusion's on sigmas[k:].
        table = make(grid[skipped:], **arguments)
    return process.for_model(table if any_step else _for_schedule_steps(process, table)), skipped


def _for_schedule_steps(process: Process, table: StepTable) -> StepTable:
    """Rows for a model that predicts x0 as rows for a prediction of the schedule's own steps.

    a and b are those of the schedule's steps, also where the loop leaves some of them out.
    """
    t = table.timestep
    if t.is_floating_point():
        raise ValueError(
            f"prediction is {process.prediction!r}, expected a sampler and a spacing with the schedule's own timesteps"
        )
    of_x, of_m = (column[t] for column in process.prediction_entry.x0(process.levels))
    return replace(
        table,
        a=table.a + table.b * of_x,
        b=table.b * of_m,
        c1=table.c1 + (table.c2 + table.cu) * of_x,
        c2=table.c2 * of_m,
        cu=table.cu * of_m,
    )


def _check_history(table: StepTable, needs: Sequence[RowNeeds], skipped: int) -> None:
    """That every row that reads a tensor of history comes after as many that keep one."""
    kept = 0
    for i, row in enumerate(needs):
        for slot, reads in enumerate(row.history, start=1):
            if reads and kept < slot:
                raise ValueError(
                    f"sampler's row {skipped + i} has h{slot} {getattr(table, f'h{slot}')[i]}, but {kept} rows of the "
                    "loop before it keep a tensor, expected 0"
                )
        kept += row.keeps


def _variance(process: Process, table: StepTable, learned: bool) -> str | None:
    """How the rows read the model's variance output. `learned`: that they do."""
    variance = process.variance_entry
    log = bool((table.l1 != 0).any())
    # A row's s of 1 stands for no deviation of its own: it only multiplies the model's.
    learned = learned or log or (variance.learned and not variance.logarithm and bool((table.s == 1).any()))
    if log and not variance.logarithm:
        raise ValueError(
            f"sampler has rows for the logarithm of a model's own variance (l1), but the variance is "
            f"{process.variance!r}, expected 'learned' or 'learned_range'"
        )
    if not learned:
        return None
    return "log" if variance.logarithm else "direct"


def _levels(process: Process, table: StepTable) -> Tensor | None:
    """(rows, 2), signal and noise where each row starts: the table's, or else those of the schedule's own timesteps."""
    levels = torch.stack([table.signal_now, table.noise_now], 1)
    if bool(levels.any()):
        return levels
    t = table.timestep
    own = not t.is_floating_point() and bool(((t >= 0) & (t < process.timesteps)).all())
    return process.tables.get("q_sample", t.device, torch.float64)[t] if own else None


def _grid(process: Process, options: LoopOptions) -> Grid:
    steps, spacing = options.steps, options.spacing
    if options.timesteps is not None:
        if steps is not None or spacing is not None:
            raise ValueError(f"timesteps are given beside steps={steps!r} and spacing={spacing!r}, expected alone")
        grid = process.scaled(make_grid(process.alphas_cumprod, options.timesteps, betas=process.betas))
        for now, after in pairwise(grid.timestep.tolist()):
            if after >= now:
                raise ValueError(f"timesteps do not descend from {now} to {after}, expected each below the one before")
        return grid
    return spaced_grid(process.alphas_cumprod, process.betas, steps, spacing, scale=process.schedule.scale)
