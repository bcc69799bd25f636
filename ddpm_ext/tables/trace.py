"""Tracing: the rows of anybody's sampler, told by running its steps on numbers of our choice.

Where every step is linear, its result is a sum of the samples, outputs of the model and noise that it and the steps
before it were given, each times a number. The scheduler runs twice in float64. In the first run samples are single
random numbers, by which trace_fit.py finds the rows. The second run proves the rows: two samples of several channels
and pixels, of other sizes and signs in each step. A step that reads a whole tensor, such as its standard deviation or
the sign of its mean, or that tells pixels apart, does something else there. In both, no sample follows from the step
before, since somebody may edit it.

A function that runs its whole loop itself, such as k-diffusion's, takes its steps between its calls of the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_ext.tables.trace_fit import (
    HISTORY,
    LINEAR,
    Array,
    Bound,
    Columns,
    Factors,
    Numbers,
    at,
    factors_of,
    factors_of_clipped,
    least_squares,
    numbers_of,
    relative,
    rows_of,
    terms_of,
)
from ddpm_ext.tables.trace_function import ObservedFunction
from ddpm_ext.tables.trace_run import CLEAN_FIELDS, Run, Step, clip_of, run_of, setting

Pair = tuple[float, float]  # the range of a clip; the quantile of a threshold and its largest divisor

RANDOM = 32  # random samples of a kind in the first run
UNIT = 2.0**-20  # their size, where no clip is to touch them
PROVING = 2, 3, 4, 5, *[2] * 8  # the shape of samples in the second run, as far as these have dimensions
SIZES = 16.0, 1.0, 4.0  # of their numbers in each step, by turns
TAIL, FAR = 11, 10.0  # every so many numbers, one is so far from the mean, for a step that clamps such ones
LARGE = 100.0  # a level of noise at which an error in what is read of the sample would not be seen beside outputs
EXACT = 1e-12  # how far the model's input may be from a factor times the sample, relatively


class TraceResult(NamedTuple):
    """A scheduler's steps as rows, and what else is known of them.

    Attributes:
        columns: those of a StepTable: timestep and NAMES, (rows,) each.
        clip: the range that the predicted clean sample is clipped to, or None.
        residual: the largest relative difference between a scheduler's own step and its row.
        steps: what each step did on random numbers.
        noise: the number of the draw that is a step's z, or None where it has none.
        history_draws: for each step, the numbers of the draws that it reads as its history, the first one as history1.
        second: whether a x + b m, clipped, is the second tensor that steps return; False where they return none.
        of_last: (rows,), of each row the part of c1 that is a factor of the last row's result, which is its sample
            where nobody edits that.
        begins: the rows with which the steps of a function begin, as its callback tells.
        leads: whether a function's first row comes before it calls the model.
        asks: whether a function read attributes of the model.
        scales: for each step, what its sample is multiplied by for the model; None where it is not.
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
    begins: tuple[int, ...] = ()
    leads: bool = False
    asks: bool = False


def trace_columns(sampler: Any, steps: Any, arguments: Mapping[str, Any]) -> dict[str, Array]:
    """The columns of StepTable.trace, whose docstring has the arguments and the errors."""
    if hasattr(sampler, "set_timesteps"):
        if setting(sampler, "thresholding"):
            raise ValueError("thresholding divides by a quantile of the sample, which is not linear")
        scheduler = copy.deepcopy(sampler)
        scheduler.set_timesteps(steps, **arguments)
        if len(scheduler.timesteps) == 0:
            raise ValueError(f"steps is {steps!r}, for which the scheduler has no timesteps, expected at least 1")
        return follow(scheduler, list(scheduler.timesteps), second=CLEAN_FIELDS).columns
    if callable(sampler):
        return follow_function(sampler, steps, arguments).columns
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
    """The rows of a scheduler's steps at `times`, from the state that it is in.

    Where the scheduler takes no step at the last timestep, which is the end of the step before, it has no row.

    Args:
        scheduler: it stays as it is. Where it divides the predicted clean sample by a quantile, the rows are those for
            a clip to -1 and 1 after that.
        times: what the steps are called with, in order.
        options: further arguments of every step; GIVEN for a tensor like the samples, a list for one of each step.
        second: the names under which steps may return a x + b m beside the next sample; None: any name.
        dims: how many dimensions samples have.

    Raises:
        ValueError: a step is not linear, or no row can say what it does.
    """
    options = options or {}
    try:
        first = _FirstRun(run_of(scheduler, times, options, dims), second)
    except IndexError:
        if len(times) == 1:
            raise
        first = _FirstRun(run_of(scheduler, times[:-1], options, dims), second)
    clip = threshold = of_clean = None
    rows = first.rows()
    if first.run.clip is not None and not first.are_rows(rows, first.long()):  # a clip that never acts leaves rows
        clip, threshold = clip_of(scheduler)
        if "prediction_type" in getattr(scheduler, "config", {}):
            other, settings = copy.deepcopy(scheduler), {name: setting(scheduler, name) for name in scheduler.config}
            other.register_to_config(**settings | {"prediction_type": "sample"})
            of_clean = functools.partial(_FirstRun, run_of(other, first.run.times, options, dims), (), first.level)
        rows = first.clipped_rows(clip, of_clean)
    return first.proven(rows, clip, threshold)


def follow_function(
    sampler: Callable[..., Any], sigmas: Any, options: Mapping[str, Any], like: object = None
) -> TraceResult:
    """The rows of a function of k-diffusion's kind; the arguments and the errors are StepTable.trace's.

    like: the model, whose attributes the function may read.

    A row begins with each call of the model. Where the function adds noise before the first one, a row that calls no
    model comes before it. The samples' levels are (1, sigma).
    """
    function = ObservedFunction(sampler, sigmas, options, like)
    first = _FirstRun(function.run, CLEAN_FIELDS)
    traced = first.proven(first.rows())
    sigma = traced.columns["timestep"]
    after, ones = np.append(sigma[1:], float(sigmas[-1])), np.ones_like(sigma)
    levels = {"signal_now": ones, "noise_now": sigma, "signal_after": ones, "noise_after": after}
    columns = traced.columns | levels | {"draw": np.arange(len(sigma))}
    return traced._replace(columns=columns, begins=function.begins, leads=function.leads, asks=function.asks)


class _FirstRun:
    """A loop on single random numbers, so short that no clip touches them.

    Attributes:
        clean: (steps, 2), a and b of the clean sample that each step returns; `second`: whether they do.
    """

    def __init__(self, run: Run, second: Sequence[str] | None, level: Array | None = None) -> None:
        """level: Numbers'; None: found by a run without, which has another one after it where it is large."""
        self.run, n = run, len(run.times)
        self.level = np.ones(n) if level is None else level
        self.short, self.steps = self._numbers(UNIT, UNIT)
        self.noise: list[int | None] = [None] * n
        self.history_draws: list[list[int]] = [[] for _ in range(n)]
        self.clean, self.second = np.zeros((n, 2)), False
        names = {step.result.name for step in self.steps}
        if self.short.second is not None and (second is None or names <= {*second}):
            columns = np.stack([self.short.unit(), self.short.m], 1)
            factors, errors = least_squares(columns, self.short.second, self.short.negligible())
            self.second = bool((errors <= LINEAR).all())
            self.clean = factors if self.second else self.clean
        if level is None:
            scales, (a, b) = _scales(self.short), self.clean.T
            natural = np.divide(np.abs(b), np.abs(a), out=np.ones(n), where=a != 0)
            natural = np.maximum(natural, 1 if scales is None else 1 / np.abs(scales))
            if natural.max() > LARGE:
                self.__init__(run, second, natural)  # type: ignore[misc]

    def _numbers(self, size: float, of_noise: float) -> tuple[Numbers, list[Step]]:
        generator, shape = np.random.default_rng(0), (len(self.run.times), RANDOM)

        def inputs(kind: int) -> Array:
            return signed((size if kind < 2 else of_noise) * generator.standard_normal(shape), 1)

        return numbers_of(self.run, (RANDOM, *[1] * (self.run.dims - 1)), inputs, self.level)

    def long(self) -> Numbers:
        """Another run, of numbers that are clipped here and there."""
        return self._numbers(2 * max(1.0, self.run.clip or 0.0), 1.0)[0]

    def rows(self) -> Columns:
        """Those without a clip."""
        return self._rows(self.short, factors_of(self.run, self.short))

    def clipped_rows(self, clip: Pair, of_clean: Callable[[], _FirstRun] | None) -> Columns:
        """Those of steps that clip the predicted clean sample to this range.

        of_clean: makes the first run of the same scheduler for a model that returns the clean sample itself: its steps
            are what follows on the clip. None: the scheduler knows no such models.
        """
        factors = factors_of(self.run, self.short)
        has_history = bool(factors.past.any() or factors.of_last.any())
        if of_clean is not None and (has_history or not self.second):
            other = of_clean()
            rows, x, x0, none = other.rows(), other.factors.x, other.factors.m, np.zeros(len(factors.x))
            if not x0.all():
                raise ValueError("a step does not read the clean sample, which is clipped")
            if not self.second:
                self.clean = np.stack([(factors.x - x) / x0, factors.m / x0], 1)
            a, b = self.clean.T
            return rows | {"a": a / self.level, "b": b, "c0": rows["c2"], "c2": none, "k0": rows["k2"], "k2": none}
        if not self.second:  # such as a consistency model's, whose steps lead to the clean sample
            self.clean = np.stack([factors.x, factors.m], 1)
        loop = self.long()
        x0 = np.clip(self.clean[:, :1] * loop.unit() + self.clean[:, 1:] * loop.m, *clip)
        return self._rows(loop, factors_of_clipped(self.run, loop, x0))

    def _rows(self, loop: Numbers, factors: Factors) -> Columns:
        self.factors = factors
        for i in range(len(self.steps)):
            used = np.flatnonzero(factors.z[i]).tolist()
            drawn = [draw for draw in used if draw >= self.run.given]
            if len(drawn) > 1:
                raise ValueError(f"{at(self.run, i)}, adds {len(drawn)} draws of noise, expected at most 1")
            self.noise[i] = next(iter(drawn or used), None)
            self.history_draws[i] = [draw for draw in used if draw != self.noise[i]]
        rows = rows_of(self.run, loop, factors, self.clean, self.noise)
        for i, draws in enumerate(self.history_draws):
            if len(draws) > HISTORY or (draws and any(rows[f"h{1 + k}"][i] for k in range(HISTORY))):
                raise ValueError(f"step {i} reads {len(draws)} given tensors beside those of earlier steps")
            for k, draw in enumerate(draws):
                rows[f"h{1 + k}"][i] = factors.z[i, draw]
        return rows

    def _errors(self, rows: Columns, loop: Numbers, bound: Bound) -> Array:
        """By how much each step of a loop differs from its row, relatively."""
        x0, parts, terms = terms_of(rows, loop, self.noise, self.history_draws, bound)
        errors = relative(np.abs(loop.prev - terms.sum(0)), np.abs(terms).sum(0))
        if self.second:
            second = np.inf if loop.second is None else loop.second
            errors = np.maximum(errors, relative(np.abs(second - x0), np.abs(parts).sum(0)))
        return errors

    def are_rows(self, rows: Columns, loop: Numbers) -> bool:
        return bool((self._errors(rows, loop, lambda x0: x0) <= loop.bound()).all())

    def proven(self, rows: Columns, clip: Pair | None = None, threshold: Pair | None = None) -> TraceResult:
        """What tracing found, once rows have taken the steps of a second run. Raises ValueError where they differ."""
        run, scales, worst = self.run, _scales(self.short), 0.0
        proof = second_run(run, rows["a"], rows["b"], self.level)
        for loop in proof:
            errors = self._errors(rows, loop, lambda x0: _bounded(x0, clip, threshold))
            for i in np.flatnonzero(~(errors <= loop.bound())):
                raise ValueError(f"{at(run, i)}, is not linear: random numbers differ by {errors[i]:.1e}, relatively")
            worst = max(worst, float(errors.max()))
        times = np.array([float(t) for t in run.times])
        if run.unit == "timestep" and (times % 1 == 0).all():
            times = times.astype(np.int64)
        columns = {"timestep": times} | rows
        is_scaled = scales is not None and all(_scales(loop, scales) is not None for loop in proof)
        factors = scales.tolist() if scales is not None and is_scaled else None
        of_last = columns.pop("of_last").tolist()
        steps = [step._replace(prev=None, second=None, scaled=None) for step in self.steps]
        noise, draws = self.noise, self.history_draws
        return TraceResult(columns, clip, worst, steps, noise, draws, self.second, of_last, factors)


def second_run(run: Run, a: Array, b: Array, level: Array) -> list[Numbers]:
    """One sample, and another one, or both together. Where a loop may clip, the second one's predicted clean sample
    a x + b m is about as large as the clip's range, and not mostly beyond it, as it is at a high level of noise."""
    shape = PROVING[: run.dims]
    n, count, generator = len(run.times), int(np.prod(shape)), np.random.default_rng(1)
    size = 2 * max(1.0, run.clip or 0.0)

    def random(kind: int) -> Array:
        made = generator.standard_normal((n, count))
        made[:, ::TAIL] += FAR * np.sign(made[:, ::TAIL])
        return signed(np.resize(SIZES, (n, 1)) * (size if kind < 2 else 1.0) * made, -1)

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
    """What samples were multiplied by for the model; None where something else, or by something else than `factors`."""
    if loop.scaled is None:
        return None
    if factors is None:
        largest = np.abs(loop.x).argmax(1)[:, None]
        factors = (np.take_along_axis(loop.scaled, largest, 1) / np.take_along_axis(loop.x, largest, 1))[:, 0]
    product = factors[:, None] * loop.x
    return factors if (np.abs(loop.scaled - product) <= EXACT * np.abs(product)).all() else None


def _bounded(x0: Array, clip: Pair | None, threshold: Pair | None) -> Array:
    """Clean samples after the clip, (steps, numel of a sample)."""
    if threshold is not None:  # eq. (7) of Saharia et al. 2022, in diffusers' form
        quantile, largest = threshold
        divisor = np.clip(np.quantile(np.abs(x0), quantile, axis=-1, keepdims=True), 1, largest)
        x0 = np.clip(x0, -divisor, divisor) / divisor
    return x0 if clip is None else np.clip(x0, *clip)
