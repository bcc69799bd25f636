"""Named samplers and spacings: how near each pair ends to the teacher with a fixed number of model calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.row_needs import row_needs
from ddpm_ext.tables.samplers import CFG_PP, SAMPLERS, WITH_ETA
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning.errors import Errors
from ddpm_ext.tuning.teacher import Trajectory

FINALISTS = 12  # how many named samplers are compared on all held-out samples, after a first round with few samples
FIRST = 16  # the number of samples of the first round, rounded up to whole batches


Name = tuple[str, str, int]  # a named sampler: the names of its sampler and of its spacing, and its number of steps


@dataclass(frozen=True, kw_only=True)
class Named(Errors):
    """A named sampler, that is, a sampler with a spacing, and the errors of its samples.

    Attributes:
        sampler, spacing, steps, eta: the options of its loop. eta is None for a sampler that has no eta. In a report
            about a pipeline of diffusers, `sampler` may be the scheduler's class, and `spacing` may be "its own" or
            "even". p_sample_loop takes none of these.
        calls: the number of model calls in its loop.

    Examples:
        >>> from ddpm_ext.tuning import Tuner
        >>> tuner = Tuner(gd, model, images.shape, seeds=4, progress=False)  # doctest: +SKIP
        >>> nearest = tuner.compare(3)[0]  # doctest: +SKIP
        >>> images = gd.p_sample_loop(model, images.shape, **nearest.options)  # doctest: +SKIP
    """

    sampler: str
    spacing: str
    steps: int
    calls: int
    eta: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of p_sample_loop for its loop."""
        eta = {} if self.eta is None else {"eta": self.eta}
        return {"sampler": self.sampler, "spacing": self.spacing, "steps": self.steps, **eta}

    @property
    def label(self) -> str:
        """The loop in words, without its number of steps."""
        return f"{self.sampler} with {self.spacing}" + ("" if self.eta is None else f", eta {self.eta:g}")

    def __str__(self) -> str:
        return self.label + ("" if self.steps == self.calls else f", {self.steps} steps")


def named_tables(diffusion: GaussianDiffusion, calls: int) -> dict[Name, StepTable]:
    """The tables of all deterministic samplers with all spacings, for loops of `calls` model calls, without duplicates.

    Samplers with an eta get an eta of 0. CFG++'s samplers are left out: their scale of guidance has another meaning,
    and without guidance they equal other samplers.
    """
    tables: dict[Name, StepTable] = {}
    seen_numbers = set()
    for sampler in (name for name in SAMPLERS if name not in CFG_PP):
        for spacing in SPACINGS:
            # A sampler calls the model once or twice a step; its first or last step may make one call more or less.
            for steps in dict.fromkeys((calls, (calls + 1) // 2, calls - 1)):
                try:
                    table, called = table_of(diffusion, sampler, spacing, steps)
                except (TypeError, ValueError):  # see table_of
                    continue
                if called != calls:
                    continue
                numbers = table.packed("cpu", torch.float64).numpy().tobytes()
                if numbers not in seen_numbers and not (table.s != 0).any():
                    seen_numbers.add(numbers)
                    tables[sampler, spacing, steps] = table
                break
    return tables


def table_of(diffusion: GaussianDiffusion, sampler: str, spacing: str, steps: int) -> tuple[StepTable, int]:
    """The table of this sampler and spacing, and the number of its model calls. A sampler with an eta gets an eta of 0.

    Raises TypeError or ValueError for a spacing that the schedule or this number of steps does not have, and for the
    prediction "x_prev" if the sampler or spacing has fractional timesteps.
    """
    options = LoopOptions(sampler=sampler, steps=steps, spacing=spacing, eta=eta_of(sampler))
    table = make_loop_rows(diffusion, options).table
    return table, sum(needs.calls_model for needs in row_needs(table))


def eta_of(sampler: str) -> float | None:
    """The eta with which a sampler adds no noise; None for a sampler without eta."""
    return 0.0 if sampler in WITH_ETA else None


def rank_names(trajectories: Sequence[Trajectory], tables: Mapping[Name, StepTable], calls: int) -> list[Named]:
    """The named samplers of `tables` with their errors, the smallest error first.

    First are the FINALISTS best of the first round, by their errors on all samples. The other samplers follow, by their
    errors in the first round.
    """
    first = first_round(len(trajectories), len(trajectories[0].samples))
    measured = {name: [batch.errors_of(table) for batch in trajectories[:first]] for name, table in tables.items()}
    ranked = _ranked(measured, calls)
    finalists = {(named.sampler, named.spacing, named.steps): named for named in ranked[:FINALISTS]}
    for name in finalists:
        measured[name] += [batch.errors_of(tables[name]) for batch in trajectories[first:]]
    return [*_ranked({name: measured[name] for name in finalists}, calls), *ranked[FINALISTS:]]


def first_round(batches: int, size: int) -> int:
    """The number of batches, of `size` samples each, on which all named samplers are compared."""
    return min(batches, -(-FIRST // size))


def _ranked(errors: Mapping[Name, Sequence[Tensor]], calls: int) -> list[Named]:
    named = [named_of(name, calls, torch.cat([*parts])) for name, parts in errors.items()]
    return sorted(named, key=lambda entry: entry.error)


def named_of(name: Name, calls: int, distances: Tensor) -> Named:
    """The Named for `name`. distances: those of its loop's samples to the teacher's samples, (samples,)."""
    sampler, spacing, steps = name
    errors = vars(Errors.of(distances))
    return Named(sampler=sampler, spacing=spacing, steps=steps, calls=calls, eta=eta_of(sampler), **errors)
