"""Tracing: the rows of anybody's sampler, found by running its own steps on numbers of our choice.

Where every step is linear, its result is a sum of the samples, outputs of the model and noise that it and the steps
before it were given, each times a number. These numbers are read off by running the scheduler in float64 on a batch of
unit vectors, one for each of those tensors. A step gets a sample of its own there, as if it did not follow from the
step before: then a tensor that the scheduler stores appears in all later steps with the same proportions of sample and
output, and these are what a row keeps. The numbers of each row are fitted with the samples that do follow from each
other, since a sample may stand for what it was made of. Random numbers beside the unit vectors, in the same run, prove
the rows in the end, and show where a scheduler is not linear.

A function that runs its whole loop itself, such as k-diffusion's, takes its steps between its calls of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ddpm_ext.tables.trace_batch import Array, Numbers, Trial, is_scaled, proof_of, relative
from ddpm_ext.tables.trace_function import observed_function
from ddpm_ext.tables.trace_linear import NAMES, Columns, Linear, at, least_squares, terms_of
from ddpm_ext.tables.trace_run import CLEAN_FIELDS, Run, Step, clip_of, run_of, setting, with_settings
from ddpm_ext.tables.trace_watch import Watch, can_watch

Pair = tuple[float, float]  # the range of a clip; the quantile of a threshold and its largest divisor


class TraceResult(NamedTuple):
    """A scheduler's steps as rows, and what else is known of them.

    Attributes:
        columns: those of a StepTable: timestep and NAMES, (rows,) each.
        clip: the range that the predicted clean sample is clipped to, or None.
        residual: the largest relative difference between a scheduler's own step and its row.
        steps: what each step did on random numbers.
        noise: the number of the draw that is a step's z, or None where it has none.
        given: for each step, the numbers of the draws that stand in the place of its history, the first in that of h1.
        second: whether a x + b m, clipped, is the second tensor that steps return; False where they return none.
        own: for each row, `Linear.own`.
        begins: the rows with which the steps of a function begin, as its callback tells.
        asks: whether a function read attributes of the model.
        scales: for each step, what its sample is multiplied by for the model; None where it is not.
        read: the attributes of the scheduler that its steps read before they wrote them; None: nobody knows.
    """

    columns: dict[str, Array]
    clip: Pair | None
    residual: float
    steps: list[Step]
    noise: list[int | None]
    given: list[list[int]]
    second: bool
    own: list[float]
    scales: Array | None = None
    begins: tuple[int, ...] = ()
    asks: bool = False
    read: frozenset[str] | None = None


def trace_columns(sampler: Any, steps: Any, arguments: Mapping[str, Any]) -> dict[str, Array]:
    """The columns of StepTable.trace, whose docstring has the arguments and the errors."""
    if hasattr(sampler, "set_timesteps"):
        if setting(sampler, "thresholding"):
            raise ValueError("thresholding divides by a quantile of the sample, which is not linear")
        own = copy.deepcopy(sampler)
        own.set_timesteps(steps, **arguments)
        if len(own.timesteps) == 0:
            raise ValueError(f"steps is {steps!r}, for which the scheduler has no timesteps, expected at least 1")
        return follow(own, list(own.timesteps), second=CLEAN_FIELDS).columns
    if callable(sampler):
        return follow_function(sampler, steps, arguments).columns
    raise TypeError(
        f"scheduler is a {type(sampler).__name__}, expected an object with set_timesteps and step, or a function of "
        "model, x and sigmas"
    )


def follow(
    scheduler: Any,
    timesteps: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    second: Sequence[str] | None = None,
    dims: int = 4,
) -> TraceResult:
    """The rows of a scheduler's steps at `timesteps`, from the state that it is in.

    Where the scheduler takes no step at the last timestep, which is the end of the step before, it has no row.

    Args:
        scheduler: it stays as it is. Where it divides the predicted clean sample by a quantile, the rows are those for
            a clip to -1 and 1 after that.
        timesteps: what the steps are called with, in order.
        options: further arguments of every step; GIVEN for a tensor like the samples, a list for one of each step.
        second: the names under which steps may return a x + b m beside the next sample; None: any name.
        dims: how many dimensions samples have.

    Raises:
        ValueError: a step is not linear, or no row can say what it does.
    """
    options = options or {}
    if can_watch(scheduler):
        # Of what is refused, a look at each function may find another reason, or none.
        with contextlib.suppress(ValueError):
            return _followed(scheduler, timesteps, options, second, dims, Watch())
    return _followed(scheduler, timesteps, options, second, dims, None)


def _followed(
    scheduler: Any,
    timesteps: Sequence[Any],
    options: Mapping[str, Any],
    second: Sequence[str] | None,
    dims: int,
    watch: Watch | None,
) -> TraceResult:
    run = run_of(scheduler, timesteps, options, dims, watch)
    try:
        trial = Trial.of(run)
    except IndexError:
        if len(timesteps) == 1:
            raise
        run = run_of(scheduler, timesteps[:-1], options, dims, watch)
        trial = Trial.of(run)
    if watch is not None and not trial.follows.wide:
        raise ValueError("a step computes in a lower precision")
    linear = Linear(run, trial, second)
    of_times = partial(run_of, options=options, dims=dims, watch=watch)
    found = _proven(linear, *(_clipping(linear, scheduler, of_times) if run.clips else (linear.rows(),)))
    return found._replace(read=None if watch is None else watch.read())


def follow_function(
    sampler: Callable[..., Any], sigmas: Any, options: Mapping[str, Any], like: object = None
) -> TraceResult:
    """The rows of a function of k-diffusion's kind; the arguments and the errors are StepTable.trace's.

    like: the model, whose attributes the function may read.

    A row begins with each call of the model. Where the function adds noise before the first one, a row that calls no
    model comes before it. The samples' levels are (1, sigma).
    """
    function = observed_function(sampler, sigmas, options, like)
    linear = Linear(function.run, Trial.of(function.run), CLEAN_FIELDS)
    traced = _proven(linear, linear.rows())
    sigma = traced.columns["timestep"]
    ones = np.ones_like(sigma)
    levels = {
        "signal_now": ones,
        "noise_now": sigma,
        "signal_after": ones,
        "noise_after": np.append(sigma[1:], float(sigmas[-1])),
        "draw": np.arange(len(sigma)),
    }
    return traced._replace(columns=traced.columns | levels, begins=function.begins, asks=function.asks)


# ------------------------------------------------------------------------------------------------------------ clips


def _clipping(
    linear: Linear, scheduler: Any, run_of_other: Callable[[Any, Sequence[Any]], Run]
) -> tuple[Columns, Pair | None, Pair | None]:
    """The rows of steps that may clip, the range to which they do, and the threshold before that; None where they do
    not.

    run_of_other: makes the run of a scheduler with other settings, at given timesteps.
    """
    clipped = linear.trial.clipped
    assert clipped is not None
    with contextlib.suppress(ValueError):  # what a clip hides may be a row all the same
        rows = linear.rows()
        if (_errors(rows, linear, clipped) <= clipped.bound()).all():
            return rows, None, None
    clip, threshold = clip_of(scheduler)
    # A scheduler of one prediction that returns no clean sample, such as a consistency model's, steps to it.
    steps_to_clean = not linear.second and "prediction_type" not in getattr(scheduler, "config", {})
    if linear.has_history() or not (linear.second or steps_to_clean):
        of_clean = run_of_other(with_settings(scheduler, prediction_type="sample"), linear.run.times)
        return _clipped_alone(linear, Linear(of_clean, Trial.of(of_clean), ())), clip, threshold
    return _clipped(linear, clipped, clip), clip, threshold


def _clipped(linear: Linear, loop: Numbers, clip: Pair) -> Columns:
    """The rows of steps that clip the predicted clean sample, which they return or step to, and have no history.

    linear: of numbers that are not clipped. loop: those that are clipped here and there. There the clipped clean sample
    does not follow from sample and output, so that the factors of all three are found.
    """
    rows = {name: np.zeros(linear.n) for name in NAMES} | {"s": linear.noise_factors()}
    linear.put_given(rows)
    rows["a"], rows["b"] = (linear.clean if linear.second else linear.prev[:, 0, :2]).T
    x0, _, others = terms_of(rows, linear, loop, partial(_bounded, clip=clip))
    target = loop.prev - others.sum(0)
    columns = {"c0": x0, "c1": loop.x, "c2": loop.m}
    left, least = np.arange(linear.n), np.zeros(0)
    for names in (("c0",), ("c0", "c1"), ("c0", "c2"), ("c0", "c1", "c2")):
        factors, errors = least_squares(np.stack([columns[name][left] for name in names], 1), target[left])
        fits = errors <= loop.bound()
        for name, values in zip(names, factors.T, strict=True):
            rows[name][left[fits]] = values[fits]
        left, least = left[~fits], errors[~fits]
        if not len(left):
            return rows
    raise ValueError(f"{at(linear, left[0])}, is not linear after the clip: {least[0]:.1e} of it is left")


def _clipped_alone(linear: Linear, steps: Linear) -> Columns:
    """The rows of steps that clip the predicted clean sample and do all else with that one alone.

    linear: of numbers that are not clipped. steps: the same of a scheduler whose model returns the clean sample itself,
    whose steps are what follows on the clip. The proof shows whether they are the same for other outputs.
    """
    rows, (x, m), (x_beside, x0) = steps.rows(), linear.prev[:, 0, :2].T, steps.prev[:, 0, :2].T
    for at_step in np.flatnonzero(x0 == 0):
        raise ValueError(f"{at(linear, at_step)}, does not read the clean sample, which is clipped")
    a, b = linear.clean.T if linear.second else ((x - x_beside) / x0, m / x0)
    none = np.zeros(linear.n)
    return rows | {"a": a, "b": b, "c0": rows["c2"], "c2": none, "k0": rows["k2"], "k2": none}


# ------------------------------------------------------------------------------------------------------------ proof


def _proven(linear: Linear, rows: Columns, clip: Pair | None = None, threshold: Pair | None = None) -> TraceResult:
    """What tracing found, once the rows have taken every step of another run. Raises ValueError where one differs."""
    proof, scales, worst = proof_of(linear.run, rows["a"], rows["b"]), linear.trial.scales, 0.0
    # Whose part of a sample is unknown that is another one than the step before has made, `own`, has no such samples.
    for loop in proof[: 1 if np.isnan(rows["own"]).any() else None]:
        errors = _errors(rows, linear, loop, partial(_bounded, clip=clip, threshold=threshold))
        for i in np.flatnonzero(~(errors <= loop.bound())):
            raise ValueError(f"{at(linear, i)}, is not linear: random numbers differ by {errors[i]:.1e}, relatively")
        worst = max(worst, float(errors.max()))
    if scales is not None and not all(is_scaled(loop, scales) for loop in proof):
        scales = None
    times = np.array([float(t) for t in linear.run.times])
    if linear.run.unit == "timestep" and (times % 1 == 0).all():
        times = times.astype(np.int64)
    columns = {"timestep": times} | rows
    own = columns.pop("own").tolist()
    return TraceResult(columns, clip, worst, linear.trial.steps, linear.noise, linear.given, linear.second, own, scales)


def _errors(rows: Columns, linear: Linear, loop: Numbers, bound: Callable[[Array], Array] = lambda x0: x0) -> Array:
    """By how much each step of a loop differs from its row, relatively, (steps,). bound: clips clean samples."""
    x0, parts, terms = terms_of(rows, linear, loop, bound)
    errors = relative(np.abs(loop.prev - terms.sum(0)), np.abs(terms).sum(0))
    if linear.second:
        second = np.stack([values for values in loop.second if values is not None])
        errors = np.maximum(errors, relative(np.abs(second - x0), np.abs(parts).sum(0)))
    return errors


def _bounded(x0: Array, clip: Pair | None, threshold: Pair | None = None) -> Array:
    """Clean samples after the clip, (steps, numel of a sample)."""
    if threshold is not None:  # eq. (7) of Saharia et al. 2022, in diffusers' form
        quantile, largest = threshold
        divisor = np.clip(np.quantile(np.abs(x0), quantile, axis=-1, keepdims=True), 1, largest)
        x0 = np.clip(x0, -divisor, divisor) / divisor
    return x0 if clip is None else np.clip(x0, *clip)
