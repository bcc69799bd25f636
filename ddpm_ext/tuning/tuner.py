"""Tunes a step table to one model, for a fixed number of model calls."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import calls_bar, require
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.notes import notes_of_loop
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.ops.noise import Philox, check_rng_of_many
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning import search as timesteps_search
from ddpm_ext.tuning.errors import Errors, typical
from ddpm_ext.tuning.fit import Rows, fit
from ddpm_ext.tuning.joint import ROUNDS, Fit, polish, polish_calls
from ddpm_ext.tuning.loops import Loops
from ddpm_ext.tuning.names import FINALISTS, Name, Named, first_round, named_of, named_tables, rank_names, table_of
from ddpm_ext.tuning.report import Report
from ddpm_ext.tuning.teacher import SAMPLER, STEPS, Teacher, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
BAR_TITLE = "calls of the model, at most"  # the end of a progress bar's title: the bar's total is an upper bound
ROUNDS_ON_HALF = 1  # the rounds of `polish` in each fit on half of the samples; the best fit continues with all samples
# To find a named sampler with an error as small as the fit's, the nearest sampler of each spacing, for up to
# NAMES_TRIED spacings, runs with its number of steps times each of STEP_FACTORS.
NAMES_TRIED, STEP_FACTORS = 4, (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


@dataclass(frozen=True)
class Tuned:
    """A tuned table and its report.

    Attributes:
        table: for `sampler=` of a loop, or StepTable.save.
        report: the errors of the table and of the named samplers.

    Examples:
        >>> from ddpm_ext.tuning import tune
        >>> tuned = tune(gd, model, images.shape, steps=4, seeds=4, progress=False)  # doctest: +SKIP
        >>> tuned.table.save("tuned.json")  # doctest: +SKIP
        >>> figure = tuned.plot("tuned.png")  # doctest: +SKIP
    """

    table: StepTable
    report: Report

    def plot(self, path: str | None = None) -> Figure:
        """Draws the errors of the table and of the named samplers as a matplotlib figure.

        If `path` is not None, the figure is also written to this file.

        Raises:
            MissingExtra: matplotlib is not installed.
            ValueError, OSError: `path` can't be written, or its ending is unknown.
        """
        return require("ddpm_ext.plots", "drawing what tuning found").tuning_figure([self.report], path)


def tuned(table: StepTable, notes: Mapping[str, Any], report: Report) -> Tuned:
    """A Tuned whose table has these notes and those of the report. Logs a summary of the report."""
    _log.info("tuned a table of %d calls, error %.4f; %s", report.calls, report.error, report.pays)
    return Tuned(replace(table, notes={**notes, **report.notes}), report)


class Tuner:
    """Tunes tables for loops that differ only in their number of model calls and share one teacher.

    The arguments are those of the function `tune`, without `steps`.

    Attributes:
        teacher_error, whole_timesteps: see Report. They are known after the first call of `compare` or `tune`.

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
        autocast: torch.dtype | None = None,
        input_dtype: torch.dtype | None = None,
        seeds: int = 64,
        rng: Philox | None = None,
        progress: bool = True,
    ) -> None:
        if diffusion.timesteps < STEPS:
            raise ValueError(
                f"the diffusion has {diffusion.timesteps} timesteps, expected at least {STEPS}: so many steps has the "
                "loop that tables are fitted to"
            )
        rng = check_rng_of_many(Philox(seed=0) if rng is None else rng)
        options: dict[str, Any] = {
            "guidance": guidance,
            "clip_denoised": clip_denoised,
            "model_kwargs": model_kwargs,
            "autocast": autocast,
            "input_dtype": input_dtype,
        }
        checked = LoopOptions(**options)
        self._guided = checked.guide is not None
        self._notes = notes_of_loop(diffusion, checked) | {
            "schedule": f"{diffusion.timesteps} timesteps, whose signal sums to {diffusion.schedule.signal.sum():.4f}"
        }
        options["guidance"] = checked.guide
        self._diffusion, self._loops = diffusion, Loops(diffusion, model, shape, device=device, rng=rng, **options)
        self._shape = self._loops.shape
        seeds = checks.integer("seeds", seeds, 2**20, "2^20", start=1)
        self._batches = -(-seeds // self._shape[0])
        self._half = -(-self._batches // 2)
        self._progress = progress
        self._fitted: list[Trajectory] = []
        self._check: list[Trajectory] = []
        self._held_out: list[Trajectory] = []
        self._shared_calls, self._names_calls = 0, dict[int, int]()
        self._names: dict[int, list[Named]] = {}  # by the number of calls
        self._tables: dict[int, dict[Name, StepTable]] = {}  # by the number of calls
        self.teacher_error = 0.0
        self.whole_timesteps = False
        self._fractions_tried = False

    @property
    def calls(self) -> int:
        """The number of model calls so far."""
        return self._loops.model.calls

    def planned_calls(self, steps: Sequence[int], *, fit: bool = True) -> int:
        """The most model calls that tuning takes for tables of these numbers of steps.

        fit: whether tables are fitted. With False, only the named samplers are compared.

        Raises:
            TypeError, ValueError: steps are not ints, or out of range.
        """
        held_out, timesteps = self._batches, self._diffusion.timesteps
        all_fitted = self._batches + self._half
        planned = Teacher.calls_to_check + Teacher.calls * (held_out + (all_fitted if fit else 0))
        for count in steps:
            checks.integer("steps", count, timesteps + 1, "timesteps + 1", start=1)
            names = len(self._named_tables(count))
            first = first_round(held_out, self._shape[0])
            planned += count  # a trial whether the model takes timesteps that are not integers
            planned += count * (names * first + min(names, FINALISTS) * (held_out - first))
            if fit:
                # Each of the first fits uses half of the samples to fit to. As many check samples compare these fits.
                starts, halves = timesteps_search.FOUND, 2 * self._half
                planned += count * self._half * timesteps_search.EVALUATIONS * len(timesteps_search.STARTS)
                planned += count * starts * 2 * halves + count * 2 * all_fitted + count * 3 * held_out
                planned += starts * halves * polish_calls(count, ROUNDS_ON_HALF, guided=self._guided)
                planned += all_fitted * polish_calls(count, ROUNDS, guided=self._guided)
                # An upper bound for _as_near: its numbers of steps are rounded up, and some steps call the model twice.
                planned += math.ceil((count + 1) * sum(STEP_FACTORS) + 2 * len(STEP_FACTORS)) * NAMES_TRIED * held_out
        return planned

    def compare(self, calls: int) -> list[Named]:
        """The named samplers with this number of model calls, the nearest to the teacher first.

        The errors of the first 12 are measured on all held-out samples, the other errors on 16 of these, rounded up to
        whole batches. Raises: as `tune`.
        """
        checks.integer("steps", calls, self._diffusion.timesteps + 1, "timesteps + 1", start=1)
        if calls not in self._names:
            self._try_fractions(calls)
            planned = self.planned_calls([calls], fit=False)
            with calls_bar(planned, f"named samplers: {BAR_TITLE}", self._progress) as self._loops.model.on_call:
                self._prepare(fit=False)
                before = self.calls
                tables = {name: table for name, table in self._named_tables(calls).items() if self._takes(table)}
                self._names[calls] = rank_names(self._held_out, tables, calls)
                self._names_calls[calls] = self.calls - before
        return self._names[calls]

    def tune(self, steps: int) -> Tuned:
        """The table with `steps` model calls, and its report; see the function `tune`."""
        names = self.compare(steps)
        with calls_bar(self.planned_calls([steps]), f"fit: {BAR_TITLE}", self._progress) as self._loops.model.on_call:
            self._prepare(fit=True)
            calls_before = self.calls
            best_fit = self._fit(steps)
            table = best_fit.rows.table(best_fit.weights)
            errors = self._errors(table)
            fitted_error = typical(errors)
            fitted = fitted_error < names[0].error
            if not fitted:
                nearest = names[0]
                table = self._named_tables(steps)[nearest.sampler, nearest.spacing, nearest.steps]
                errors = self._errors(table)
            bfloat16_errors = [batch.errors_of(table, torch.bfloat16) for batch in self._held_out]
            as_near = self._as_near(names, errors) if fitted else None
            cost = self._shared_calls + self._names_calls[steps] + self.calls - calls_before
        report = Report(
            **vars(Errors.of(errors)),
            calls=steps,
            fitted=fitted,
            fitted_error=fitted_error,
            names=names,
            as_near=as_near,
            looked=STEP_FACTORS[-1],
            bfloat16_error=typical(torch.cat(bfloat16_errors)),
            timesteps=table.timestep.tolist(),
            teacher=f"{STEPS} steps of {SAMPLER}",
            teacher_error=self.teacher_error,
            seeds=self._batches * self._shape[0],
            held_out=len(errors),
            model_calls=cost,
            names_calls=self._names_calls[steps],
            batch=self._shape[0],
            whole_timesteps=self.whole_timesteps,
        )
        return tuned(table, self._notes, report)

    def _fit(self, steps: int) -> Fit:
        """The best table of `steps` rows. Several fits, on half of the samples to fit to, begin at the best timesteps
        of the search. The fit with the smallest error on the check samples is continued on all samples to fit to.
        """

        half = self._fitted[: self._half]

        def error(timesteps: tuple[int, ...]) -> float:
            return typical(fit(Rows(self._diffusion, timesteps), half)[1])

        starts = []
        for timesteps in timesteps_search.search(error, self._diffusion.timesteps, steps):
            rows = Rows(self._diffusion, timesteps)
            starts.append(polish(rows, fit(rows, half)[0], half, self._check, ROUNDS_ON_HALF))
        best = min(starts, key=lambda start: start.error)
        return polish(best.rows, best.weights, self._fitted, self._check)

    def _as_near(self, names: Sequence[Named], errors: Tensor) -> Named | None:
        """A named sampler with more steps, whose error is at most that of a table with these errors, or None.

        The best named sampler of each spacing is tried, for up to NAMES_TRIED spacings, since for some spacings more
        steps do not reduce the error. These samplers run with their steps times the first of STEP_FACTORS, then the
        second and so on, until one has so small an error. A sampler with a larger error than the table's on the first
        held-out batch skips the other batches.

        Args:
            names: the named samplers with as many calls as the table, the nearest to the teacher first.
            errors: the table's, for each held-out sample.
        """
        nearest = list({named.spacing: named for named in reversed(names)}.values())
        nearest = sorted(nearest, key=lambda named: named.error)[:NAMES_TRIED]
        first, *others = self._held_out
        for factor in STEP_FACTORS:
            for named in nearest:
                name = named.sampler, named.spacing, math.ceil(factor * named.steps)
                with contextlib.suppress(ValueError):  # table_of's, for more steps than the spacing has
                    table, calls = table_of(self._diffusion, *name)
                    if not self._takes(table):
                        continue
                    parts = [first.errors_of(table)]
                    if typical(parts[0]) > typical(errors[: len(parts[0])]):
                        continue
                    candidate = named_of(name, calls, torch.cat(parts + [batch.errors_of(table) for batch in others]))
                    if candidate.error <= typical(errors):
                        return candidate
        return None

    def _errors(self, table: StepTable) -> Tensor:
        """The errors of a table on the held-out samples."""
        return torch.cat([batch.errors_of(table) for batch in self._held_out])

    def _prepare(self, *, fit: bool) -> None:
        """Runs the teacher on the held-out samples and, for a fit, on as many samples to fit to and half as many check
        samples, which decide between fits. Half an odd number of batches is rounded up. Trajectories of an earlier call
        are used again.
        """
        calls_before, count, teacher = self.calls, self._batches, Teacher(self._diffusion)

        def trajectories(batches: int, first: int) -> list[Trajectory]:
            return [teacher.trajectory(self._loops.batch(i)) for i in range(first, first + batches)]

        if not self._held_out:
            held_out = trajectories(count, count)
            self.teacher_error = teacher.error_of(held_out[0])
            self._held_out = held_out
        if fit and not self._fitted:
            self._fitted, self._check = trajectories(count, 0), trajectories(self._half, 2 * count)
        self._shared_calls += self.calls - calls_before

    def _try_fractions(self, calls: int) -> None:
        """Tests, before the teacher runs, whether the model takes timesteps that are not integers."""
        if self._fractions_tried:
            return
        tables = self._named_tables(calls).values()
        between = next((table for table in tables if table.timestep.is_floating_point()), None)
        if between is not None:
            self._fractions_tried, calls_before = True, self.calls
            # With some schedules, such as a flow's, the teacher also calls the model at such timesteps. A model that
            # fails there can't be tuned, and its error is raised in the teacher's loop. So there is no trial then.
            is_usual = Teacher(self._diffusion).between
            self.whole_timesteps = not is_usual and self._loops.fails(between, self._loops.batch(0))
            self._shared_calls += self.calls - calls_before

    def _takes(self, table: StepTable) -> bool:
        return not (self.whole_timesteps and table.timestep.is_floating_point())

    def _named_tables(self, calls: int) -> dict[Name, StepTable]:
        if calls not in self._tables:
            self._tables[calls] = named_tables(self._diffusion, calls)
        return self._tables[calls]


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
    autocast: torch.dtype | None = None,
    input_dtype: torch.dtype | None = None,
    seeds: int = 64,
    rng: Philox | None = None,
    progress: bool = True,
) -> Tuned:
    """Tunes a step table to a model, so that a loop with few model calls ends as near as possible to a loop of many.

    The result is the fitted table, or the table of the best named sampler with as many calls if the fit is not nearer.

    A search chooses timesteps. For each list of timesteps that it tries, the numbers of each row are a least-squares
    fit to the trajectories of a deterministic sampler in 100 steps, from the same noise. Then all numbers and timesteps
    are fitted together. No gradients of the model are needed. The named samplers and the fitted table are compared on
    other samples, by the mean of the smallest 90 % of the samples' distances to those of the 100 steps.

    Args:
        diffusion, model: see p_sample_loop. The model is called in its current mode, so call eval() on a network.
        shape: the shape of a batch, (batch, ...).
        steps: the number of model calls in a loop with the table, from 1 to the diffusion's timesteps.
        guidance, clip_denoised, model_kwargs, device, autocast, input_dtype: see p_sample_loop. Use the values of
            the loops that will take the table. The table is fitted to them, and a loop with another guidance or clip
            warns.
        seeds: the number of samples to fit to, rounded up to whole batches. As many other samples are held out, and
            half as many, again in whole batches, decide which fit is best. Each sample takes the memory of 100 samples.
        rng: seed and first sample id of the samples. None means Philox(seed=0). The same seed gives the same table.
        progress: whether to show a progress bar on a terminal (if tqdm is installed).

    Returns:
        Tuned. The notes of its table say what the table was made for.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range; the diffusion has fewer than 100
            timesteps or a learned variance; the model returns values that are not finite; or the loop of 100 steps has
            not converged, for example because the model is untrained.

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
        autocast=autocast,
        input_dtype=input_dtype,
        seeds=seeds,
        rng=rng,
        progress=progress,
    ).tune(steps)
