"""Tracing: computes the rows of any library's sampler by running its steps on random numbers.

The result of a linear step is a weighted sum of samples, model outputs and noise, of this step and of earlier steps.
The scheduler runs twice in float64. In the first run, a sample is a single random number, and trace_fit.py computes the
rows from the results. The second run checks the rows on two samples of several channels and pixels. Their sizes change
from step to step. Their sums, which are positive in the first run, are negative unless the loop may clip. There a step
differs from its row if it depends on a whole tensor (its standard deviation, the sign of its mean) or treats pixels
differently. In both runs, the sample of a step is a new random number, not the result of the previous step, since a
caller may edit samples between steps.

A function that runs the whole loop itself, like k-diffusion's samplers, takes a step between two calls of the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_ext.tables.trace_fit import (
    HISTORY,
    LINEAR_ERROR,
    Array,
    Bound,
    Columns,
    Factors,
    Numbers,
    factors_of,
    factors_of_clipped,
    least_squares,
    numbers_of,
    relative_error,
    rows_of,
    step_label,
    terms_of,
)
from ddpm_ext.tables.trace_function import ObservedFunction
from ddpm_ext.tables.trace_run import CLEAN_FIELDS, Run, Step, clip_of, run_of, setting

Pair = tuple[float, float]  # (low, high) of a clip, or (quantile, largest divisor) of a threshold

FIRST_RUN_BATCH = 32  # how many samples, model outputs and draws of noise each step of the first run has
SCALED_INPUT = "scaled_input"  # the note of a table whose scheduler scales the model's input
FIRST_RUN_SIZE = 2.0**-20  # the size of these numbers, so small that no clip acts on them
SECOND_RUN_SHAPE = 2, 3, 4, 5, *[2] * 8  # the first `dims` entries are the shape of the second run's samples
SECOND_RUN_SIZES = 16.0, 1.0, 4.0  # the sizes of the second run's numbers, cycling over the steps
# Every OUTLIER_EVERY-th number gets OUTLIER_SIZE added to its magnitude, to reveal a step that clamps outliers.
OUTLIER_EVERY, OUTLIER_SIZE = 11, 10.0
# If a step's noise is more than this many times its signal, the first run is repeated with larger samples: otherwise
# rounding of the output's term would hide an error in the sample's factor.
LARGE_LEVEL = 100.0
SCALE_TOLERANCE = 1e-12  # the largest relative difference between the model's input and a factor times the sample


class TraceResult(NamedTuple):
    """A scheduler's steps as rows, and further results of tracing.

    Attributes:
        columns: columns of a StepTable, (rows,) each: timestep, NAMES without of_last, and for a function draw and the
            levels.
        clip: the range to which the predicted clean sample is clipped, or None.
        residual: the largest relative difference between a step of the scheduler and its row.
        steps: what each step did on random numbers.
        noise: for each step, the number of the draw that is its z, or None for a step without noise. A step's draws of
            noise are numbered from 0.
        history_draws: for each step, the numbers of further draws that it reads. Its row reads them as history, the
            first one as H1.
        second: whether the second tensor that steps return is a x + b m, clipped. False if they return only one.
        of_last: (rows,), the part of each row's c1 that multiplies the previous step's result and not the row's sample.
            The two tensors differ only if a caller edits samples between steps.
        scales: for each step, the model's input divided by the step's sample. None if scale_model_input is missing,
            returns a sample itself, or returns no multiple of it.
        step_starts: the rows at which a function calls its callback, that is, at which its steps begin.
        row_before_model: whether a function has a row before its first call of the model.
        reads_model: whether a function read attributes of the model.
    """

    columns: dict[str, Array]
    clip: Pair | None
    residual: float
    steps: list[Step]
    noise: list[int | None]
    history_draws: list[list[int]]
    second: bool
    of_last: list[float]
    scales: list[float] | None = None
    step_starts: tuple[int, ...] = ()
    row_before_model: bool = False
    reads_model: bool = False


def trace_table(sampler: Any, steps: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """The columns and the notes of StepTable.trace, whose docstring has the arguments and the errors."""
    if hasattr(sampler, "set_timesteps"):
        if setting(sampler, "thresholding"):
            raise ValueError("thresholding divides by a quantile of the sample, which is not linear")
        scheduler = copy.deepcopy(sampler)
        scheduler.set_timesteps(steps, **arguments)
        if len(scheduler.timesteps) == 0:
            raise ValueError(f"steps is {steps!r}, for which the scheduler has no timesteps, expected at least 1")
        traced = follow(scheduler, list(scheduler.timesteps), second=CLEAN_FIELDS)
        notes: dict[str, Any] = {} if traced.clip is None else {"clip": list(traced.clip)}
        scales = set(traced.scales or ())
        return traced.columns, notes | ({SCALED_INPUT: True} if scales - {1.0} else {})
    if callable(sampler):
        return follow_function(sampler, steps, arguments).columns, {}
    raise TypeError(
        f"scheduler is a {type(sampler).__name__}, expected an object with set_timesteps and step, or a function of "
        "model, x and sigmas"
    )


def follow(
    scheduler: Any,
    times: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    second: Sequence[str] | None = None,
    dims: int = 4,
) -> TraceResult:
    """The rows of a scheduler's steps at `times`, starting from the scheduler's present state.

    Some schedulers take no step at the last timestep, since it is only the end of the previous step: they have no row
    for it.

    Args:
        scheduler: it stays unchanged. If it divides the predicted clean sample by a quantile, the rows are for that
            division followed by a clip to [-1, 1].
        times: the timesteps with which the steps are called, in order.
        options: further arguments of every step. GIVEN stands for a tensor of the samples' shape. A list has a value
            for each step.
        second: the names under which steps may return a x + b m in addition to the next sample. None accepts any name.
        dims: the samples' number of dimensions.

    Raises:
        ValueError: a step is not linear, or can't be expressed as a row.
    """
    options = options or {}
    try:
        first_run = _FirstRun(run_of(scheduler, times, options, dims), second)
    except IndexError:
        if len(times) == 1:
            raise
        first_run = _FirstRun(run_of(scheduler, times[:-1], options, dims), second)
    clip = threshold = make_clean_run = None
    rows = first_run.rows()
    if first_run.run.clip is not None and not first_run.are_rows(
        rows, first_run.large_numbers()
    ):  # a clip that never acts changes no row
        clip, threshold = clip_of(scheduler)
        if "prediction_type" in getattr(scheduler, "config", {}):
            by_clean, settings = (
                copy.deepcopy(scheduler),
                {name: setting(scheduler, name) for name in scheduler.config},
            )
            by_clean.register_to_config(**settings | {"prediction_type": "sample"})
            make_clean_run = functools.partial(
                _FirstRun, run_of(by_clean, first_run.run.times, options, dims), (), first_run.level
            )
        rows = first_run.clipped_rows(clip, make_clean_run)
    return first_run.prove(rows, clip, threshold)


def follow_function(
    sampler: Callable[..., Any], sigmas: Any, options: Mapping[str, Any], like: object = None
) -> TraceResult:
    """The rows of a function like k-diffusion's samplers; the arguments and errors are those of StepTable.trace.

    like: the model whose attributes the function may read.

    A row begins with each call of the model. If the function changes the samples before its first call, a row without a
    call precedes the others. The samples' levels are (1, sigma).
    """
    function = ObservedFunction(sampler, sigmas, options, like)
    first_run = _FirstRun(function.run, CLEAN_FIELDS)
    traced = first_run.prove(first_run.rows())
    sigma = traced.columns["timestep"]
    after, ones = np.append(sigma[1:], float(sigmas[-1])), np.ones_like(sigma)
    levels = {"signal_now": ones, "noise_now": sigma, "signal_after": ones, "noise_after": after}
    columns = traced.columns | levels | {"draw": np.arange(len(sigma))}
    return traced._replace(
        columns=columns,
        step_starts=function.step_starts,
        row_before_model=function.row_before_model,
        reads_model=function.reads_model,
    )


class _FirstRun:
    """The first run: the loop on samples of a single random number, which are so small that no clip changes them.

    Attributes:
        clean: (steps, 2), a and b of the clean sample that each step returns.
        second: whether the steps return a clean sample.
    """

    def __init__(self, run: Run, second: Sequence[str] | None, level: Array | None = None) -> None:
        """level: see Numbers. With None, a run with level 1 computes it, and is repeated if the level is large."""
        self.run, n = run, len(run.times)
        self.level = np.ones(n) if level is None else level
        self.small_numbers, self.steps = self._numbers(FIRST_RUN_SIZE, FIRST_RUN_SIZE)
        self.noise: list[int | None] = [None] * n
        self.history_draws: list[list[int]] = [[] for _ in range(n)]
        self.clean, self.second = np.zeros((n, 2)), False
        names = {step.result.name for step in self.steps}
        if self.small_numbers.second is not None and (second is None or names <= {*second}):
            columns = np.stack([self.small_numbers.unit(), self.small_numbers.m], 1)
            factors, errors = least_squares(columns, self.small_numbers.second, self.small_numbers.negligible())
            self.second = bool((errors <= LINEAR_ERROR).all())
            self.clean = factors if self.second else self.clean
        if level is None:
            scales, (a, b) = _scales(self.small_numbers), self.clean.T
            needed_level = np.divide(np.abs(b), np.abs(a), out=np.ones(n), where=a != 0)
            needed_level = np.maximum(needed_level, 1 if scales is None else 1 / np.abs(scales))
            if needed_level.max() > LARGE_LEVEL:
                self.__init__(run, second, needed_level)  # type: ignore[misc]

    def _numbers(self, size: float, noise_size: float) -> tuple[Numbers, list[Step]]:
        generator, shape = np.random.default_rng(0), (len(self.run.times), FIRST_RUN_BATCH)

        def inputs(kind: int) -> Array:
            return signed((size if kind < 2 else noise_size) * generator.standard_normal(shape), 1)

        return numbers_of(self.run, (FIRST_RUN_BATCH, *[1] * (self.run.dims - 1)), inputs, self.level)

    def large_numbers(self) -> Numbers:
        """The numbers of another run, which are so large that a clip changes some of them."""
        return self._numbers(2 * max(1.0, self.run.clip or 0.0), 1.0)[0]

    def rows(self) -> Columns:
        """The rows of all steps as if none clipped: they are fitted to numbers so small that no clip changes them."""
        return self._rows(self.small_numbers, factors_of(self.run, self.small_numbers))

    def clipped_rows(self, clip: Pair, make_clean_run: Callable[[], _FirstRun] | None) -> Columns:
        """The rows of steps that clip the predicted clean sample to this range.

        make_clean_run: makes the first run of the same scheduler for a model that predicts the clean sample. The steps
            of that run show what the scheduler does after the clip. None if the scheduler does not support such models.
        """
        factors = factors_of(self.run, self.small_numbers)
        has_history = bool(factors.past.any() or factors.of_last.any())
        if make_clean_run is not None and (has_history or not self.second):
            by_clean = make_clean_run()
            rows, x, x0, zeros = (
                by_clean.rows(),
                by_clean.factors.x,
                by_clean.factors.m,
                np.zeros(len(factors.x)),
            )
            if not x0.all():
                raise ValueError("a step does not read the clean sample, which is clipped")
            if not self.second:
                self.clean = np.stack([(factors.x - x) / x0, factors.m / x0], 1)
            a, b = self.clean.T
            return rows | {"a": a / self.level, "b": b, "c0": rows["c2"], "c2": zeros, "k0": rows["k2"], "k2": zeros}
        if not self.second:  # for example a consistency model's steps, whose result is the clean sample
            self.clean = np.stack([factors.x, factors.m], 1)
        loop = self.large_numbers()
        x0 = np.clip(self.clean[:, :1] * loop.unit() + self.clean[:, 1:] * loop.m, *clip)
        return self._rows(loop, factors_of_clipped(self.run, loop, x0))

    def _rows(self, loop: Numbers, factors: Factors) -> Columns:
        self.factors = factors
        for i in range(len(self.steps)):
            used = np.flatnonzero(factors.z[i]).tolist()
            drawn = [draw for draw in used if draw >= self.run.option_tensors]
            if len(drawn) > 1:
                raise ValueError(f"{step_label(self.run, i)}, adds {len(drawn)} draws of noise, expected at most 1")
            self.noise[i] = next(iter(drawn or used), None)
            self.history_draws[i] = [draw for draw in used if draw != self.noise[i]]
        rows = rows_of(self.run, loop, factors, self.clean, self.noise)
        for i, draws in enumerate(self.history_draws):
            if len(draws) > HISTORY or (draws and any(rows[f"h{1 + k}"][i] for k in range(HISTORY))):
                raise ValueError(
                    f"step {i} reads {len(draws)} extra noises, expected at most {HISTORY}, and no history"
                )
            for k, draw in enumerate(draws):
                rows[f"h{1 + k}"][i] = factors.z[i, draw]
        return rows

    def _errors(self, rows: Columns, loop: Numbers, bound: Bound) -> Array:
        """The relative difference between each step of a loop and its row."""
        x0, parts, terms = terms_of(rows, loop, self.noise, self.history_draws, bound)
        errors = relative_error(np.abs(loop.prev - terms.sum(0)), np.abs(terms).sum(0))
        if self.second:
            second = np.inf if loop.second is None else loop.second
            errors = np.maximum(errors, relative_error(np.abs(second - x0), np.abs(parts).sum(0)))
        return errors

    def are_rows(self, rows: Columns, loop: Numbers) -> bool:
        """Whether the rows compute the same results as the steps of this loop, up to rounding."""
        return bool((self._errors(rows, loop, lambda x0: x0) <= loop.bound()).all())

    def prove(self, rows: Columns, clip: Pair | None = None, threshold: Pair | None = None) -> TraceResult:
        """Compares the rows with the steps of the second run, and returns the result of tracing.

        Raises:
            ValueError: a step differs from its row.
        """
        run, scales, largest_error = self.run, _scales(self.small_numbers), 0.0
        proof = second_run(run, rows["a"], rows["b"], self.level)
        for loop in proof:
            errors = self._errors(rows, loop, lambda x0: _bounded(x0, clip, threshold))
            for i in np.flatnonzero(~(errors <= loop.bound())):
                raise ValueError(
                    f"{step_label(run, i)}, is not linear: random numbers differ by {errors[i]:.1e}, relatively"
                )
            largest_error = max(largest_error, float(errors.max()))
        times = np.array([float(t) for t in run.times])
        if run.unit == "timestep" and (times % 1 == 0).all():
            times = times.astype(np.int64)
        columns = {"timestep": times} | rows
        is_scaled = scales is not None and all(_scales(loop, scales) is not None for loop in proof)
        factors = scales.tolist() if scales is not None and is_scaled else None
        of_last = columns.pop("of_last").tolist()
        steps = [step._replace(prev=None, second=None, scaled=None) for step in self.steps]
        noise, draws = self.noise, self.history_draws
        return TraceResult(columns, clip, largest_error, steps, noise, draws, self.second, of_last, factors)


def second_run(run: Run, a: Array, b: Array, level: Array) -> list[Numbers]:
    """The second run's numbers, split into two halves if the loop may clip.

    In the second half, x or m is chosen such that the predicted clean sample a x + b m is about as large as the clip's
    range. At a high level of noise, random x and m would give clean samples that are nearly all clipped.
    """
    shape = SECOND_RUN_SHAPE[: run.dims]
    n, count, generator = len(run.times), int(np.prod(shape)), np.random.default_rng(1)
    size = 2 * max(1.0, run.clip or 0.0)

    def random(kind: int) -> Array:
        normal = generator.standard_normal((n, count))
        normal[:, ::OUTLIER_EVERY] += OUTLIER_SIZE * np.sign(normal[:, ::OUTLIER_EVERY])
        return signed(np.resize(SECOND_RUN_SIZES, (n, 1)) * (size if kind < 2 else 1.0) * normal, -1)

    x, m, half = random(0), random(1), slice(count // 2, None)
    if run.clip is not None:
        x0, a, b = size * generator.standard_normal((n, count - half.start)), (a * level)[:, None], b[:, None]
        by_sample = np.abs(a) > 1e-3 * np.abs(b)
        x[:, half] = np.where(by_sample, (x0 - b * m[:, half]) / np.where(by_sample, a, 1), x[:, half])
        m[:, half] = np.where(by_sample | (b == 0), m[:, half], (x0 - a * x[:, half]) / np.where(b == 0, 1, b))
    loop, _ = numbers_of(run, shape, lambda kind: (x, m)[kind] if kind < 2 else random(kind), level)
    return [loop] if run.clip is None else [loop.part(slice(half.start)), loop.part(half)]


def signed(numbers: Array, sign: int) -> Array:
    """Numbers (steps, count) times 1 or -1 in each step, so that their sum has this sign."""
    return np.where(numbers.sum(1, keepdims=True) * sign < 0, -numbers, numbers)


def _scales(loop: Numbers, factors: Array | None = None) -> Array | None:
    """The factor by which scale_model_input multiplies each step's sample, (steps,).

    None if scale_model_input is missing, returns a step's sample itself, or returns no multiple of it.

    factors: the expected factors, which are returned if all inputs have them; otherwise the result is None.
    """
    if loop.scaled is None:
        return None
    if factors is None:
        largest = np.abs(loop.x).argmax(1)[:, None]
        factors = (np.take_along_axis(loop.scaled, largest, 1) / np.take_along_axis(loop.x, largest, 1))[:, 0]
    product = factors[:, None] * loop.x
    return factors if (np.abs(loop.scaled - product) <= SCALE_TOLERANCE * np.abs(product)).all() else None


def _bounded(x0: Array, clip: Pair | None, threshold: Pair | None) -> Array:
    """Applies threshold and clip to clean samples, (steps, elements of a sample)."""
    if threshold is not None:  # eq. (7) of Saharia et al. 2022, in diffusers' form
        quantile, largest = threshold
        divisor = np.clip(np.quantile(np.abs(x0), quantile, axis=-1, keepdims=True), 1, largest)
        x0 = np.clip(x0, -divisor, divisor) / divisor
    return x0 if clip is None else np.clip(x0, *clip)
