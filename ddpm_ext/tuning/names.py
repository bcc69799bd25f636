"""The named samplers, by the spacings that they go with: how near each ends to the teacher in so many calls."""

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

FINALISTS = 12  # names that are tried on all held-out samples, after a first round
FIRST = 16  # samples of the first round, in whole batches


Name = tuple[str, str, int]  # sampler, spacing, steps


@dataclass(frozen=True, kw_only=True)
class Named(Errors):
    """How near a sampler comes by its name.

    sampler, spacing, steps, eta: of its loop, with eta None where the sampler has none. calls: of the model.

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
        """What its loop is asked for, as options of p_sample_loop."""
        eta = {} if self.eta is None else {"eta": self.eta}
        return {"sampler": self.sampler, "spacing": self.spacing, "steps": self.steps, **eta}

    @property
    def label(self) -> str:
        """Its name in words, without the number of steps."""
        return f"{self.sampler} with {self.spacing}" + ("" if self.eta is None else f", eta {self.eta:g}")

    def __str__(self) -> str:
        return self.label + ("" if self.steps == self.calls else f", {self.steps} steps")


def named_tables(diffusion: GaussianDiffusion, calls: int) -> dict[Name, StepTable]:
    """The tables of all deterministic samplers with all spacings that call the model so many times, each once.

    Samplers with an eta have one of 0. Those of CFG++ are left out: their scale of guidance is not the usual one, and
    without guidance they are other names for samplers that are here.
    """
    found: dict[Name, StepTable] = {}
    seen = set()
    for sampler in (name for name in SAMPLERS if name not in CFG_PP):
        for spacing in SPACINGS:
            # A step calls the model once or twice, and the first or the last one may be an exception.
            for steps in dict.fromkeys((calls, (calls + 1) // 2, calls - 1)):
                try:
                    table, called = table_of(diffusion, sampler, spacing, steps)
                except (TypeError, ValueError):  # a spacing that the schedule or this number of steps does not have
                    continue
                if called != calls:
                    continue
                numbers = table.packed("cpu", torch.float64).numpy().tobytes()
                if numbers not in seen and not (table.s != 0).any():
                    seen.add(numbers)
                    found[sampler, spacing, steps] = table
                break
    return found


def table_of(diffusion: GaussianDiffusion, sampler: str, spacing: str, steps: int) -> tuple[StepTable, int]:
    """The table of these names, without noise, and how often it calls the model.

    Raises TypeError or ValueError for a spacing that the schedule or this number of steps does not have.
    """
    options = LoopOptions(sampler=sampler, steps=steps, spacing=spacing, eta=eta_of(sampler))
    table = make_loop_rows(diffusion, options).table
    return table, sum(needs.calls_model for needs in row_needs(table))


def eta_of(sampler: str) -> float | None:
    """With which a sampler adds no noise; None where it has none."""
    return 0.0 if sampler in WITH_ETA else None


def rank_names(trajectories: Sequence[Trajectory], tables: Mapping[Name, StepTable], calls: int) -> list[Named]:
    """The named tables of so many calls: the finalists, the nearest first, on all samples; then the others, on those of
    the first round alone."""
    first = first_round(len(trajectories), len(trajectories[0].samples))
    found = {name: [own.errors_of(table) for own in trajectories[:first]] for name, table in tables.items()}
    ranked = _ranked(found, calls)
    finalists = {(each.sampler, each.spacing, each.steps): each for each in ranked[:FINALISTS]}
    for name in finalists:
        found[name] += [own.errors_of(tables[name]) for own in trajectories[first:]]
    return [*_ranked({name: found[name] for name in finalists}, calls), *ranked[FINALISTS:]]


def first_round(batches: int, size: int) -> int:
    """On how many of the batches, of so many samples each, all names are tried."""
    return min(batches, -(-FIRST // size))


def _ranked(found: Mapping[Name, Sequence[Tensor]], calls: int) -> list[Named]:
    named = [named_of(name, calls, torch.cat([*parts])) for name, parts in found.items()]
    return sorted(named, key=lambda each: each.error)


def named_of(name: Name, calls: int, distances: Tensor) -> Named:
    sampler, spacing, steps = name
    own = vars(Errors.of(distances))
    return Named(sampler=sampler, spacing=spacing, steps=steps, calls=calls, eta=eta_of(sampler), **own)
