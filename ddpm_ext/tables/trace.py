"""Tracing: the rows of anybody's sampler, found by running its own steps on numbers of our choice.

Where every step is linear, its result is a sum of the samples, outputs of the model and noise that it and the steps
before it were given, each times a number. These numbers are read off by running the scheduler in float64 on a batch of
unit vectors, one for each of those tensors. A step gets a sample of its own there, as if it did not follow from the
step before: then a tensor that the scheduler stores appears in all later steps with the same proportions of sample and
output, and these are what a row keeps. The numbers of each row are fitted with the samples that do follow from each
other, since a sample may stand for what it was made of. A loop on random numbers proves the rows in the end, and shows
where a scheduler is not linear.

A function that runs its whole loop itself, as k-diffusion's do, takes its steps between its calls of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_ext.tables.trace_function import observed_function
from ddpm_ext.tables.trace_linear import HISTORY, NAMES, Linear, Row, at, row_of
from ddpm_ext.tables.trace_random import BATCH, Array, RandomRun, relative
from ddpm_ext.tables.trace_run import CLEAN_FIELDS, Run, Step, clip_of, run_of, setting, with_settings, without_clip

Clip = tuple[float, float]


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
        begins: the rows with which the steps of a function begin, as its callback tells.
        asks: whether a function read attributes of the model.
    """

    columns: dict[str, Array]
    clip: Clip | None
    residual: float
    steps: list[Step]
    noise: list[int | None]
    given: list[list[int]]
    second: bool
    begins: tuple[int, ...] = ()
    asks: bool = False


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
        options: further arguments of every step; GIVEN for a tensor like the samples.
        second: the names under which steps may return a x + b m beside the next sample; None: any name.
        dims: how many dimensions samples have.

    Raises:
        ValueError: a step is not linear, or no row can say what it does.
    """
    plain, options = without_clip(scheduler), options or {}
    run = run_of(scheduler, timesteps, options, dims)
    try:
        loop = RandomRun.of(run, seed=0)
    except IndexError:
        if len(timesteps) == 1:
            raise
        timesteps = timesteps[:-1]
        run = run_of(scheduler, timesteps, options, dims)
        loop = RandomRun.of(run, seed=0)
    linear = Linear(run_of(plain, timesteps, options, dims), loop, second)
    try:
        linear.prove(loop)
    except ValueError:
        if plain is scheduler:
            raise
    else:  # nothing is clipped
        return _proven(linear.rows(), None, linear, run, loop)
    clip = clip_of(scheduler)
    # A scheduler of one prediction that returns no clean sample, such as a consistency model's, steps to the clean one.
    steps_to_clean = not linear.second and "prediction_type" not in getattr(scheduler, "config", {})
    if linear.has_history() or not (linear.second or steps_to_clean):
        return _proven(_clipped_alone(linear, plain, options, loop), clip, linear, run, loop)
    # Samples that follow from a clipped one are not clipped again, so they do not follow.
    loop = RandomRun.of(run, seed=0, follows=False)
    return _proven(_clipped(linear, loop, clip), clip, linear, run, loop, follows=False)


def follow_function(
    sampler: Callable[..., Any], sigmas: Any, options: Mapping[str, Any], like: object = None
) -> TraceResult:
    """The rows of a function of k-diffusion's kind; the arguments and the errors are StepTable.trace's.

    like: the model, whose attributes the function may read.

    A row begins with each call of the model. Where the function adds noise before the first one, a row that calls no
    model comes before it. The samples' levels are (1, sigma).
    """
    function = observed_function(sampler, sigmas, options, like)
    loop = RandomRun.of(function.run, seed=0)
    linear = Linear(function.run, loop, CLEAN_FIELDS)
    linear.prove(loop)
    traced = _proven(linear.rows(), None, linear, function.run, loop)
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


def _proven(
    rows: Sequence[Row], clip: Clip | None, linear: Linear, run: Run, loop: RandomRun, *, follows: bool = True
) -> TraceResult:
    """What tracing found, once the rows have been tried on a loop of other numbers; follows: as for RandomRun.of."""
    residual = _prove(rows, clip, linear, RandomRun.of(run, seed=1, follows=follows))
    times = np.array([float(t) for t in run.times])
    if run.unit == "timestep" and (times % 1 == 0).all():
        times = times.astype(np.int64)
    columns = {"timestep": times} | {name: np.array([row[name] for row in rows]) for name in NAMES}
    return TraceResult(columns, clip, residual, loop.steps, linear.noise, linear.given, linear.second)


# ------------------------------------------------------------------------------------------------------------ clips


def _clipped(linear: Linear, loop: RandomRun, clip: Clip) -> list[Row]:
    """The rows of steps that clip the predicted clean sample, which they return or step to, and have no history.

    linear: without the clip. loop: with it, on numbers that are clipped here and there. There the clipped clean sample
    does not follow from sample and output, so that the factors of all three are found.
    """
    rows = []
    for i in range(linear.n):
        n, column = linear.n, linear.column(i)
        s = 0.0 if column is None else float(linear.prev[i, column])
        h = linear.prev[i, linear.given_columns(i)]
        a, b = linear.clean[i] if linear.second else linear.prev[i, [i, n + i]]
        x0 = np.clip(a * loop.x[i] + b * loop.m[i], *clip)
        target = loop.prev[i] - s * loop.noise(i, linear.noise[i]) - h @ loop.z[i][linear.given[i]]
        for names in (("c0",), ("c0", "c1"), ("c0", "c2"), ("c0", "c1", "c2")):
            columns = np.stack([{"c0": x0, "c1": loop.x[i], "c2": loop.m[i]}[name] for name in names], 1)
            factors = np.linalg.lstsq(columns, target, rcond=1e-13)[0]
            error = relative(np.abs(target - columns @ factors), np.abs(columns) @ np.abs(factors))
            if error <= loop.bound():
                break
        else:
            raise ValueError(f"{at(linear, i)}, is not linear after the clip: {error:.1e} of it is left")
        row = row_of(a=float(a), b=float(b), s=s, **dict(zip(names, map(float, factors), strict=True)))
        rows.append(row | {f"h{1 + k}": float(factor) for k, factor in enumerate(h)})
    return rows


def _clipped_alone(linear: Linear, plain: Any, options: Mapping[str, Any], loop: RandomRun) -> list[Row]:
    """The rows of steps that clip the predicted clean sample and do all else with that one alone.

    linear: without the clip, as `plain` is. Where the model returns the clean sample itself, the steps are what follows
    on the clip. The proof shows whether they are the same for other outputs.
    """
    of_clean = with_settings(plain, prediction_type="sample")
    steps = Linear(run_of(of_clean, linear.run.times, options, linear.run.dims), loop, ())
    rows = []
    for i, row in enumerate(steps.rows()):
        own = [i, linear.n + i]
        (x, m), (x_beside, x0) = linear.prev[i, own], steps.prev[i, own]
        if not x0:
            raise ValueError(f"{at(linear, i)}, does not read the clean sample, which is clipped")
        a, b = linear.clean[i] if linear.second else ((x - x_beside) / x0, m / x0)
        rows.append(row | {"a": float(a), "b": float(b), "c0": row["c2"], "c2": 0.0, "k0": row["k2"], "k2": 0.0})
    return rows


# ------------------------------------------------------------------------------------------------------------ proof


def _prove(rows: Sequence[Row], clip: Clip | None, linear: Linear, loop: RandomRun) -> float:
    """The largest residual of the rows in a loop. Raises ValueError where one is too large."""
    largest, ring = 0.0, [np.zeros(BATCH)] * HISTORY
    for i, row in enumerate(rows):
        x, m, z = loop.x[i], loop.m[i], loop.noise(i, linear.noise[i])
        x0 = row["a"] * x + row["b"] * m
        if clip is not None:
            x0 = np.clip(x0, *clip)
        factors = [row[name] for name in ("c0", "c1", "c2", "s", "h1", "h2", "h3")]
        read = [*loop.z[i][linear.given[i]], *ring][:HISTORY]
        terms = np.array(factors)[:, None] * np.array([x0, x, m, z, *read])
        errors = [relative(np.abs(loop.prev[i] - terms.sum(0)), np.abs(terms).sum(0))]
        second = loop.second[i]
        if linear.second and second is not None:
            parts = np.abs(row["a"] * x) + np.abs(row["b"] * m)
            errors.append(relative(np.abs(second - x0), parts))
        if not max(errors) <= loop.bound():
            raise ValueError(f"{at(linear, i)}, is not linear: random numbers differ by {max(errors):.1e}, relatively")
        largest = max(largest, *errors)
        if row["k0"] or row["k1"] or row["k2"]:
            ring = [row["k0"] * x0 + row["k1"] * x + row["k2"] * m, *ring][:HISTORY]
    return largest
