"""A step table for one model, with as few calls of it as asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import has_bars, require
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.notes import notes_of_loop
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.ops.noise import Philox, check_rng_of_many
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning import search as timesteps_search
from ddpm_ext.tuning.fit import Rows, fit, polish, polish_calls
from ddpm_ext.tuning.loops import Loops, errors
from ddpm_ext.tuning.names import FINALISTS, Name, Named, named_tables, rank_names
from ddpm_ext.tuning.report import Report
from ddpm_ext.tuning.teacher import SAMPLER, STEPS, Teacher, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Tuned:
    """table: for `sampler=` of a loop, or StepTable.save. report: how near it comes, and what else was tried.

    Examples:
        >>> from ddpm_ext.tuning import tune
        >>> tuned = tune(gd, model, images.shape, steps=4, seeds=4, progress=False)  # doctest: +SKIP
        >>> tuned.table.save("tuned.json")  # doctest: +SKIP
        >>> figure = tuned.plot("tuned.png")  # doctest: +SKIP
    """

    table: StepTable
    report: Report

    def plot(self, path: str | None = None) -> Figure:
        """The errors of the table and of the names, as a matplotlib figure, which is also written to `path`.

        Raises:
            MissingExtra: matplotlib is not installed. ValueError, OSError: `path` can't be written.
        """
        return require("ddpm_ext.plots", "drawing what tuning found").tuning_figure([self.report], path)


class Tuner:
    """Tunes tables for loops that differ in their number of calls alone: all have the same teacher.

    Args:
        diffusion, model, shape, guidance, clip_denoised, model_kwargs, device, seeds, rng, progress: those of `tune`.

    Attributes:
        teacher_error: see Report.

    Examples:
        >>> from ddpm_ext.tuning import Tuner
        >>> tuner = Tuner(gd, model, images.shape, seeds=4)  # doctest: +SKIP
        >>> most = tuner.planned_calls([3, 4])  # doctest: +SKIP
        >>> nearest = tuner.compare(3)[0]  # doctest: +SKIP
        >>> tables = {calls: tuner.tune(calls).table for calls in (3, 4)}  # doctest: +SKIP
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        shape: tuple[int, ...],
        *,
        guidance: Guidance | float | None = None,
        clip_denoised: bool | Clip | DynamicThreshold = True,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        seeds: int = 32,
        rng: Philox | None = None,
        progress: bool = True,
    ) -> None:
        if diffusion.timesteps < STEPS:
            raise ValueError(
                f"the diffusion has {diffusion.timesteps} timesteps, expected at least {STEPS}: so many steps has the "
                "loop that tables are fitted to"
            )
        rng = check_rng_of_many(Philox(seed=0) if rng is None else rng)
        options = {"guidance": guidance, "clip_denoised": clip_denoised, "model_kwargs": model_kwargs}
        self._loops = Loops(diffusion, model, shape, device=device, rng=rng, **options)  # type: ignore[arg-type]
        self._notes = notes_of_loop(diffusion, LoopOptions(**options))  # type: ignore[arg-type]
        self._batches = -(-checks.integer("seeds", seeds, 2**20, "2^20", start=1) // self._loops.shape[0])
        self._progress = progress
        self._fitted: list[Trajectory] = []
        self._held_out: list[Trajectory] = []
        self._names: dict[int, list[Named]] = {}  # by the number of calls, as the next one
        self._tables: dict[int, dict[Name, StepTable]] = {}
        self.teacher_error = 0.0

    @property
    def calls(self) -> int:
        """How often the model was called so far."""
        return self._loops.model.calls

    def planned_calls(self, steps: Sequence[int], *, fit: bool = True) -> int:
        """How often the model is called at most for tables of so many steps. fit: False for the named samplers alone.

        Raises:
            TypeError, ValueError: steps are no ints, or out of range.
        """
        of_batch, batches = Teacher.calls_to_check, self._batches
        planned = of_batch + Teacher.calls * batches * (2 if fit else 1)
        for count in steps:
            checks.integer("steps", count, self._loops.diffusion.timesteps + 1, "timesteps + 1", start=1)
            names = len(self._named_tables(count))
            planned += count * (names + min(names, FINALISTS) * (batches - 1) + 2 * batches)
            if fit:
                planned += batches * (timesteps_search.EVALUATIONS * len(timesteps_search.STARTS) + 2) * count
                planned += batches * polish_calls(count, guided=self._loops.guidance is not None)
        return planned

    def compare(self, calls: int) -> list[Named]:
        """The named samplers at so many calls, the nearest to the teacher first. Raises: as `tune`."""
        checks.integer("steps", calls, self._loops.diffusion.timesteps + 1, "timesteps + 1", start=1)
        if calls not in self._names:
            with self._counted(self.planned_calls([calls], fit=False), "named samplers"):
                self._prepare(fit=False)
                self._names[calls] = rank_names(self._loops, self._held_out, self._named_tables(calls), calls)
        return self._names[calls]

    def tune(self, steps: int) -> Tuned:
        """The table of so many calls; see `tune`."""
        names, loops = self.compare(steps), self._loops
        with self._counted(self.planned_calls([steps]), "fit"):
            self._prepare(fit=True)

            def error(timesteps: tuple[int, ...]) -> float:
                return fit(Rows(loops, timesteps), self._fitted)[1].mean().item()

            rows = Rows(loops, timesteps_search.search(error, loops.diffusion.timesteps, steps))
            plain, _ = fit(rows, self._fitted)
            tables = [rows.table(weights) for weights in (plain, polish(rows, self._fitted, plain)[0])]
            found = [self._held_out_errors(table) for table in tables]
        best = min(range(len(tables)), key=lambda i: found[i].mean().item())
        table, own = tables[best], found[best]
        fitted_error = own.mean().item()
        fitted = fitted_error < names[0].error
        if not fitted:
            nearest = names[0]
            table = self._named_tables(steps)[nearest.sampler, nearest.spacing, nearest.steps]
            own = self._held_out_errors(table)
        report = Report(
            calls=steps,
            fitted=fitted,
            error=own.mean().item(),
            median=own.median().item(),
            fitted_error=fitted_error,
            names=names,
            timesteps=table.timestep.tolist(),
            teacher=f"{STEPS} steps of {SAMPLER}",
            teacher_error=self.teacher_error,
            seeds=self._batches * loops.shape[0],
            held_out=len(own),
            model_calls=self.calls,
        )
        return Tuned(replace(table, notes=self._notes | report.notes), report)

    def _prepare(self, *, fit: bool) -> None:
        """Runs the teacher where that was not done."""
        teacher = Teacher(self._loops)
        if not self._held_out:
            held_out = [teacher.trajectory(self._loops.batch(self._batches + i)) for i in range(self._batches)]
            self.teacher_error = teacher.error_of(held_out[0])
            self._held_out = held_out
        if fit and not self._fitted:
            self._fitted = [teacher.trajectory(self._loops.batch(i)) for i in range(self._batches)]

    def _named_tables(self, calls: int) -> dict[Name, StepTable]:
        if calls not in self._tables:
            self._tables[calls] = named_tables(self._loops.diffusion, calls)
        return self._tables[calls]

    def _held_out_errors(self, table: StepTable) -> Tensor:
        return torch.cat([errors(self._loops.samples(table, own.batch), own.samples) for own in self._held_out])

    @contextmanager
    def _counted(self, planned: int, what: str) -> Iterator[None]:
        """Shows a progress bar of the calls of the model, of which there are `planned` at most."""
        if not (self._progress and has_bars()):
            yield
            return
        from tqdm.auto import tqdm

        with tqdm(total=planned, desc=f"{what}: calls of the model, at most", disable=None) as bar:
            self._loops.model.on_call = bar.update
            try:
                yield
            finally:
                self._loops.model.on_call = lambda: None


def tune(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: tuple[int, ...],
    *,
    steps: int = 6,
    guidance: Guidance | float | None = None,
    clip_denoised: bool | Clip | DynamicThreshold = True,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    seeds: int = 32,
    rng: Philox | None = None,
    progress: bool = True,
) -> Tuned:
    """A step table for this model, whose loop ends nearer to that of many steps than any named sampler's with as few
    calls of the model; the best name's table where no fit is nearer.

    Timesteps are searched, and at each of them the row's numbers are a least-squares problem against the trajectories
    of a deterministic sampler in 100 steps, from the same noise. The model is only called: no gradient is needed. The
    named samplers and the fitted table are then compared on other samples.

    Args:
        diffusion, model: as p_sample_loop's. The model is called in its current mode: a network belongs in eval().
        shape: of a batch, (batch, ...).
        steps: calls of the model in a loop with the table, from 1 to the diffusion's timesteps.
        guidance, clip_denoised, model_kwargs, device: as p_sample_loop's, and as in the loops that will take the table:
            for others it is not made, and they warn.
        seeds: samples to fit to, rounded up to whole batches; as many again are held out. Each takes the memory of 100
            samples.
        rng: seed and first sample id of the samples; None: Philox(seed=0). The same seed gives the same table.
        progress: whether to show a progress bar on a terminal (where tqdm is installed).

    Returns:
        Tuned: its table has notes of what it was made for.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range; a learned variance; a teacher that has not
            converged, as that of an untrained model.

    Examples:
        >>> gd = GaussianDiffusion(1000)
        >>> tuned = tune(gd, model, (4, 3, 8, 8), steps=4, seeds=8)  # doctest: +SKIP
        >>> samples = gd.p_sample_loop(model, (4, 3, 8, 8), sampler=tuned.table, record="last")  # doctest: +SKIP
    """
    return Tuner(
        diffusion,
        model,
        shape,
        guidance=guidance,
        clip_denoised=clip_denoised,
        model_kwargs=model_kwargs,
        device=device,
        seeds=seeds,
        rng=rng,
        progress=progress,
    ).tune(steps)
