"""The named samplers, by the spacings that they go with: how near each ends to the teacher in so many calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.row_needs import row_needs
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning.loops import Loops, errors
from ddpm_ext.tuning.teacher import Trajectory

FINALISTS = 12  # names that are tried on all held-out samples, after a first round on the first batch


@dataclass(frozen=True)
class Named:
    """A sampler and a spacing by their names.

    steps: of its loop; calls: of the model. error, median: of the samples' distances to the teacher's.

    Examples:
        >>> from ddpm_ext.tuning import Tuner
        >>> tuner = Tuner(gd, model, images.shape, seeds=4, progress=False)  # doctest: +SKIP
        >>> nearest = tuner.compare(3)[0]  # doctest: +SKIP
        >>> loop = {"sampler": nearest.sampler, "spacing": nearest.spacing, "steps": nearest.steps}  # doctest: +SKIP
    """

    sampler: str
    spacing: str
    steps: int
    calls: int
    error: float
    median: float

    def __str__(self) -> str:
        of_steps = "" if self.steps == self.calls else f", {self.steps} steps"
        return f"{self.sampler} with {self.spacing}{of_steps}"


Name = tuple[str, str, int]  # sampler, spacing, steps


def named_tables(diffusion: GaussianDiffusion, calls: int) -> dict[Name, StepTable]:
    """The tables of all deterministic samplers with all spacings that call the model so many times, each once.

    Samplers with an eta have one of 0. Those that read the unconditional output are left out: their scale of guidance
    is not the usual one, so that they draw other samples.
    """
    found: dict[Name, StepTable] = {}
    seen = set()
    for sampler in SAMPLERS:
        eta = 0.0 if sampler in WITH_ETA else None
        for spacing in SPACINGS:
            # A step calls the model once or twice, and the first or the last one may be an exception.
            for steps in dict.fromkeys((calls, (calls + 1) // 2, calls - 1)):
                try:
                    options = LoopOptions(sampler=sampler, steps=steps, spacing=spacing, eta=eta)
                    table = make_loop_rows(diffusion, options).table
                except (TypeError, ValueError):  # a spacing that the schedule or this number of steps does not have
                    continue
                if sum(needs.calls_model for needs in row_needs(table)) != calls:
                    continue
                numbers = table.packed("cpu", torch.float64).numpy().tobytes()
                if numbers not in seen and not ((table.s != 0) | (table.cu != 0)).any():
                    seen.add(numbers)
                    found[sampler, spacing, steps] = table
                break
    return found


def rank_names(
    loops: Loops, trajectories: Sequence[Trajectory], tables: Mapping[Name, StepTable], calls: int
) -> list[Named]:
    """The named tables of so many calls, the nearest first; the last ones after one batch alone."""
    found: dict[Name, list[Tensor]] = {}

    def try_all(names: Iterable[Name], own: Trajectory) -> None:
        for name in names:
            found.setdefault(name, []).append(errors(loops.samples(tables[name], own.batch), own.samples))

    def ranked() -> list[Named]:
        every = ((name, torch.cat(parts)) for name, parts in found.items())
        named = [Named(*name, calls, each.mean().item(), each.median().item()) for name, each in every]
        return sorted(named, key=lambda each: (math.isnan(each.error), each.error))

    try_all(tables, trajectories[0])
    finalists = [(each.sampler, each.spacing, each.steps) for each in ranked()[:FINALISTS]]
    for trajectory in trajectories[1:]:
        try_all(finalists, trajectory)
    return ranked()
