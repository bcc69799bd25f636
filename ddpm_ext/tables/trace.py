"""Tracing: the rows of anybody's sampler, found by running its own steps on numbers of our choice.

Where every step is linear, its result is a sum of the samples, outputs of the model and noise that it and the steps
before it were given, each times a number. These numbers are read off by running the scheduler in float64 on a batch of
unit vectors, one for each of those tensors. A step gets a sample of its own there, as if it did not follow from the
step before: then a tensor that the scheduler stores appears in all later steps with the same proportions of sample and
output, and these are what a row keeps. The numbers of each row are fitted with the samples that do follow from each
other, since a sample may stand for what it was made of. A loop on random numbers proves the rows in the end, and shows
where a scheduler is not linear.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_ext.tables.trace_linear import HISTORY, NAMES, Linear, Row, at, row_of
from ddpm_ext.tables.trace_loop import BATCH, Array, Loop, relative
from ddpm_ext.tables.trace_run import CLEAN_FIELDS, Step, clip_of, without_clip

__all__ = ["Traced", "follow", "trace_columns"]

Clip = tuple[float, float]


class Traced(NamedTuple):
    """A scheduler's steps as rows, and what else is known of them.

    Attributes:
        columns: those of a StepTable: timestep and NAMES, (rows,) each.
        clip: the range that the predicted clean sample is clipped to, or None.
        residual: the largest relative difference between a scheduler's own step and its row.
        steps: what each step did on random numbers.
        noise: the number of the draw that is a step's z, or None where it has none.
        given: for each step, the numbers of the draws that stand in the place of its history, the first in that of h1.
        second: whether a x + b m, clipped, is the second tensor that steps return; False where they return none.
    """

    columns: dict[str, Array]
    clip: Clip | None
    residual: float
    steps: list[Step]
    noise: list[int | None]
    given: list[list[int]]
    second: bool


def trace_columns(scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> dict[str, Array]:
    """The columns of StepTable.trace, whose docstring has the arguments and the errors."""
    if getattr(scheduler, "config", {}).get("thresholding"):
        raise ValueError("thresholding divides by a quantile of the sample, which is not linear")
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps, **arguments)
    return follow(own, list(own.timesteps), second=CLEAN_FIELDS).columns


def follow(
    scheduler: Any,
    timesteps: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    second: Sequence[str] | None = None,
    dims: int = 4,
) -> Traced:
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
    options = options or {}
    plain = without_clip(scheduler)
    try:
        loop = Loop.run(scheduler, timesteps, options, seed=0, dims=dims)
    except IndexError:
        if len(timesteps) == 1:
            raise
        timesteps = timesteps[:-1]
        loop = Loop.run(scheduler, timesteps, options, seed=0, dims=dims)
    linear = Linear.of(plain, timesteps, options, loop, second)
    clip = None if plain is scheduler or linear.error(loop) is None else clip_of(scheduler)
    if clip is None:
        linear.prove(loop)
        rows = linear.rows()
    elif linear.has_history():
        rows = _clipped_with_history(linear, plain, options, loop)
    else:  # samples that follow from a clipped one are not clipped again
        loop = Loop.run(scheduler, timesteps, options, seed=0, follows=False, dims=dims)
        rows = _clipped(linear, loop, clip)
    follows = clip is None or linear.has_history()
    proof = Loop.run(scheduler, timesteps, options, seed=1, follows=follows, dims=dims)
    residual = _prove(rows, clip, linear, proof)
    times = np.array([float(t) for t in timesteps])
    if (times % 1 == 0).all():
        times = times.astype(np.int64)
    columns = {"timestep": times} | {name: np.array([row[name] for row in rows]) for name in NAMES}
    return Traced(columns, clip, residual, loop.steps, linear.noise, linear.given, linear.second)


# ------------------------------------------------------------------------------------------------------------ clips


def _clipped(linear: Linear, loop: Loop, clip: Clip) -> list[Row]:
    """The rows of steps that clip the predicted clean sample and have no history.

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


def _clipped_with_history(linear: Linear, plain: Any, options: Mapping[str, Any], loop: Loop) -> list[Row]:
    """The rows of steps that clip the predicted clean sample and do all else with that one alone.

    linear: without the clip, as `plain` is. Where the model returns the clean sample itself, the steps are what follows
    on the clip. The proof shows whether they are the same for other outputs.
    """
    of_clean = copy.deepcopy(plain)
    of_clean.register_to_config(prediction_type="sample")
    steps = Linear.of(of_clean, linear.timesteps, options, loop, ())
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


def _prove(rows: Sequence[Row], clip: Clip | None, linear: Linear, loop: Loop) -> float:
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
