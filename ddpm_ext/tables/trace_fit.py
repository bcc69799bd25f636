"""The rows of a sampler's steps, by least squares on random numbers.

A step may read its own sample, output and noise, those of the few steps before it, and the result of the step before
it, in which all that a sampler has kept may have a part, such as an earlier sample. Each step's sample is random, and
does not follow from that result: so what a step reads of the one is told from what it reads of the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.tables.trace_run import Run, Step

Array = npt.NDArray[np.float64]
Columns = dict[str, Array]
Bound = Callable[[Array], Array]  # clips clean samples

HISTORY = 3  # tensors that a row may read
READS_MORE = f"reads more of the steps before it than the {HISTORY} tensors that rows keep"
LAGS = 5  # how many steps back: a step may keep nothing, as PNDM's second one
DRAWS = 16  # of noise in a step
LINEAR = 1e-9  # the largest relative residual of a step
ROUNDED = 1e-5  # the same where a sampler computes in float32, whatever it is given
NEGLIGIBLE = 1e-12  # a number below this part of those that it is made of is 0
CANCELS = 30.0  # how many times as large as its sum a term of a row may be
NAMES = ("a", "b", "c0", "c1", "c2", "s", "h1", "h2", "h3", "k0", "k1", "k2", "of_last")


class Numbers(NamedTuple):
    """What a loop made of random numbers: x, m, prev, second and scaled are (steps, count), z (steps, draws, count).
    second, scaled: None where a step has no second tensor, or where scale_model_input returned a sample itself.

    level: (steps,), what samples are multiplied by, beside outputs of size 1. Rows are found for samples without that.
    wide: whether results are float64.
    """

    x: Array
    m: Array
    z: Array
    prev: Array
    second: Array | None
    scaled: Array | None
    level: Array
    wide: bool

    def unit(self) -> Array:
        """The samples without their level."""
        return self.x / self.level[:, None]

    def bound(self) -> float:
        """How far from linear a step may be."""
        return LINEAR if self.wide else ROUNDED

    def negligible(self) -> float:
        return NEGLIGIBLE if self.wide else ROUNDED / 10

    def part(self, part: slice) -> Numbers:
        x, m, z, prev = (each[..., part] for each in self[:4])
        second, scaled = (None if each is None else each[:, part] for each in (self.second, self.scaled))
        return Numbers(x, m, z, prev, second, scaled, self.level, self.wide)

    def last(self) -> Array:
        """The result of the step before each."""
        return np.concatenate([np.zeros_like(self.prev[:1]), self.prev[:-1]])


def numbers_of(
    run: Run, shape: tuple[int, ...], inputs: Callable[[int], Array], level: Array
) -> tuple[Numbers, list[Step]]:
    """A run of a loop. inputs(kind): (steps, count), of samples (0), outputs (1), or the draws of each step (2 ...)."""
    kinds = {0: inputs(0) * level[:, None], 1: inputs(1)}

    def draw(i: int, k: int) -> Tensor:
        if k == DRAWS:
            raise ValueError(f"a step draws more than {DRAWS} tensors of noise")
        if 2 + k not in kinds:
            kinds[2 + k] = inputs(2 + k)
        return torch.from_numpy(kinds[2 + k][i].copy()).view(shape)

    x, m = (torch.from_numpy(kinds[kind].copy()).view(-1, *shape).unbind() for kind in (0, 1))
    steps = run.observe(x, m, draw)
    z = np.zeros((len(steps), len(kinds) - 2, x[0].numel()))
    for number, step in enumerate(steps):
        for k in range(len(step.draws)):
            z[number, k] = kinds[2 + k][number]
    prev = np.stack([flat(step.prev, shape) for step in steps])
    for i in np.flatnonzero(~np.isfinite(prev).all(1)):
        raise ValueError(f"{at(run, i)}, is not linear: its result is infinite or no number")
    second, scaled = (stacked(each, shape) for each in ([s.second for s in steps], [s.scaled for s in steps]))
    wide = all(step.prev.dtype == torch.float64 for step in steps)
    return Numbers(kinds[0], kinds[1], z, prev, second, scaled, level, wide), steps


def flat(x: Tensor, shape: tuple[int, ...]) -> Array:
    if x.shape != shape:
        raise ValueError(f"a step returns a tensor of shape {tuple(x.shape)} for samples of shape {shape}")
    return np.asarray(x.double().numpy(force=True).reshape(-1))


def stacked(tensors: Sequence[Tensor | None], shape: tuple[int, ...]) -> Array | None:
    """(steps, count), or None where a step has none."""
    arrays = [flat(x, shape) for x in tensors if x is not None]
    return np.stack(arrays) if len(arrays) == len(tensors) else None


class Factors(NamedTuple):
    """What each step adds up: the factors of the clean sample, if that is clipped; of its sample and output; of
    its draws, (steps, draws); of the samples and outputs of those before, (steps, LAGS, 2); and of the last result."""

    x0: Array
    x: Array
    m: Array
    z: Array
    past: Array
    of_last: Array


def factors_of(run: Run, loop: Numbers) -> Factors:
    """Those of steps without a clip. Raises ValueError where a step is something else."""
    try:
        factors = _without_last(run, loop)
        directions_of(run, factors.past, loop.negligible())
        return factors
    except ValueError as error:
        try:
            return _with_last(run, loop)
        except ValueError:
            raise error from None


def factors_of_clipped(run: Run, loop: Numbers, x0: Array) -> Factors:
    """Those of steps that clip clean samples, which are x0 then, (steps, count), and read nothing of other steps."""
    fitted, n = _fit(run, loop, [np.stack([x0, loop.unit(), loop.m, *loop.z.swapaxes(0, 1)], 1)]), len(x0)
    return Factors(fitted[:, 0], fitted[:, 1], fitted[:, 2], fitted[:, 3:], np.zeros((n, LAGS, 2)), np.zeros(n))


def _without_last(run: Run, loop: Numbers) -> Factors:
    """Where steps read but a few of those before, and no last result; in a function, where each sample follows from
    the step before, also where they read that alone."""
    n, k = len(loop.x), loop.z.shape[1]
    here, last = [loop.unit(), loop.m, *loop.z.swapaxes(0, 1)], loop.last()
    past = [each for pair in zip(lagged(loop.unit()), lagged(loop.m), strict=True) for each in pair]
    tries = [here, [*here, last]] if run.follows else [here]
    fitted = _fit(run, loop, [np.stack(columns, 1) for columns in (*tries, [*here, 0 * last, *past])])
    fitted = np.pad(fitted, ((0, 0), (0, 3 + k + 2 * LAGS - fitted.shape[1])))
    x, m, z, of_last, read = np.split(fitted, [1, 2, 2 + k, 3 + k], axis=1)
    return Factors(np.zeros(n), x[:, 0], m[:, 0], z, read.reshape(n, LAGS, 2), of_last[:, 0])


def _with_last(run: Run, loop: Numbers) -> Factors:
    """Where steps read the result of the one before, from the last step to the first.

    Of a step, all later ones read the same but for a factor: the direction in which the first of them is found to read
    it is known for the others. And a step reads as little as will do: early results are sums of what else there is.
    """
    n, k, last = len(loop.x), loop.z.shape[1], loop.last()
    none = np.zeros(n)
    factors = Factors(none, none.copy(), none.copy(), np.zeros((n, k)), np.zeros((n, LAGS, 2)), none.copy())
    known: dict[int, Array] = {}  # what is kept of a step: factors of its sample and output
    inputs, after = np.stack([loop.unit(), loop.m], 1), (0, False)

    def fits(i: int, lags: int, with_last: bool, free: bool) -> float:
        """Writes what step i reads, if it reads so many before it. free: also in other directions than the known ones,
        whose errors would add up over a loop; then these must be found again."""
        read = [(lag, d) for lag in range(1, lags + 1) for d in (np.eye(2) if free else known.get(i - lag, np.eye(2)))]
        columns = [*inputs[i], *loop.z[i], *[d @ inputs[i - lag] for lag, d in read], *[last[i]] * with_last]
        (fitted,), (error,) = least_squares(np.stack(columns)[None], loop.prev[i : i + 1], loop.negligible())
        past = np.zeros((LAGS, 2))
        for (lag, d), factor in zip(read, fitted[2 + k :], strict=False):
            past[lag - 1] += factor * d
        known_lags = [lag for lag in range(1, lags + 1) if i - lag in known]
        if free and not all(is_along(past[lag - 1], known[i - lag][0]) for lag in known_lags):
            return np.inf
        factors.x[i], factors.m[i], factors.z[i], factors.past[i] = fitted[0], fitted[1], fitted[2 : 2 + k], past
        factors.of_last[i] = fitted[-1] if with_last else 0
        return float(error)

    for i in reversed(range(n)):
        tries = [(lags, with_last) for lags in range(min(LAGS, i) + 1) for with_last in (False, True)]
        for (lags, with_last), free in itertools.product([after, *tries] if i > LAGS else tries, (True, False)):
            if (error := fits(i, lags, with_last, free)) <= loop.bound():
                break
        else:
            raise ValueError(refusal(run, i, error))
        after = lags, with_last
        for lag in np.flatnonzero(factors.past[i].any(1)) + 1:
            before = known.get(i - lag, np.zeros((1, 2)))
            known[i - lag] = max(before, factors.past[i, lag - 1][None], key=np.linalg.norm)
    return factors


def is_along(pair: Array, other: Array) -> bool:
    """Whether a pair is the other one times a factor, but for rounding."""
    across = abs(pair[0] * other[1] - pair[1] * other[0])
    return bool(across <= 1e-6 * np.linalg.norm(pair) * np.linalg.norm(other))


def lagged(values: Array) -> list[Array]:
    """The same of the steps before, zeros where there are none."""
    return [np.pad(values, ((lag, 0), (0, 0)))[: len(values)] for lag in range(1, min(LAGS, len(values) - 1) + 1)]


def _fit(run: Run, loop: Numbers, tries: Sequence[Array]) -> Array:
    """The factors by the first of some columns (steps, columns, count) that fit a step, each try's with more columns at
    its end than the one before, (steps, columns of the last)."""
    fitted, left, errors = np.zeros(tries[-1].shape[:2]), np.arange(len(loop.x)), np.zeros(0)
    for columns in tries:
        factors, errors = least_squares(columns[left], loop.prev[left], loop.negligible())
        fits = errors <= loop.bound()
        fitted[left[fits], : columns.shape[1]] = factors[fits]
        left, errors = left[~fits], errors[~fits]
        if not len(left):
            return fitted
    raise ValueError(refusal(run, left[0], errors[0]))


def at(run: Run, i: Any) -> str:
    return f"step {i}, at {run.unit} {float(run.times[int(i)]):g}"


def refusal(run: Run, i: Any, error: float) -> str:
    return f"{at(run, i)}, is not linear: random numbers differ by {error:.1e}, relatively; or it {READS_MORE}"


def directions_of(run: Run, past: Array, negligible: float) -> tuple[Array, npt.NDArray[np.int64]]:
    """What later steps read of each step, factors of its sample and output, (steps, 2), zeros if nothing; and
    rings_of these. Raises ValueError where they read more than one tensor of it, or one more than HISTORY."""
    n, direction = len(past), np.zeros((len(past), 2))
    lags = range(1, min(LAGS, n - 1) + 1)
    for lag in lags:
        larger = np.abs(past[lag:, lag - 1]).max(1) > np.abs(direction[:-lag]).max(1)
        direction[:-lag][larger] = past[lag:, lag - 1][larger]
    keeps = np.asarray(direction.any(1))
    rings = rings_of(keeps)
    for lag in lags:
        pair, of = past[lag:, lag - 1], direction[:-lag]
        across = np.abs(pair[:, 0] * of[:, 1] - pair[:, 1] * of[:, 0])
        for i in np.flatnonzero(across > 1e3 * negligible * (of**2).sum(1)):
            raise ValueError(f"{at(run, i)}, is read by later ones in several proportions of its sample and output")
        too_far = pair.any(1) & (rings[lag:] != np.arange(n - lag)[:, None]).all(1)
        for i in np.flatnonzero(too_far) + lag:
            raise ValueError(f"{at(run, i)}, {READS_MORE}")
    return direction, rings


def rows_of(run: Run, loop: Numbers, factors: Factors, clean: Array, noise: Sequence[int | None]) -> Columns:
    """The columns NAMES. noise: the draw that is each step's. Raises ValueError where directions_of does."""
    direction, rings = directions_of(run, factors.past, loop.negligible())
    keeps = direction.any(1)
    lengths = np.sqrt((clean**2).sum(1) * (direction**2).sum(1))
    across = np.abs(clean[:, 0] * direction[:, 1] - clean[:, 1] * direction[:, 0])
    by_clean = keeps & clean.any(1) & (across <= 1e3 * loop.negligible() * lengths)
    largest = np.take_along_axis(direction, np.abs(direction).argmax(1)[:, None], 1)
    kept = np.where(by_clean[:, None], clean, direction / np.where(largest == 0, 1, largest))
    kept[np.abs(kept) <= loop.negligible()] = 0
    n = len(loop.x)
    rows = {name: np.zeros(n) for name in NAMES} | columns_of(factors.x, factors.m, clean)
    if factors.x0.any():
        rows |= {"c0": factors.x0, "c1": factors.x, "c2": factors.m}
    rows["s"] = np.array([0.0 if k is None else factors.z[i, k] for i, k in enumerate(noise)])
    rows["c1"], rows["of_last"] = rows["c1"] / loop.level + factors.of_last, factors.of_last
    rows["k0"] = by_clean.astype(float)
    rows["k1"], rows["k2"] = np.where(keeps & ~by_clean, kept.T, 0.0)
    rows["k1"], rows["a"] = rows["k1"] / loop.level, rows["a"] / loop.level
    for i in range(n):
        for lag in np.flatnonzero(factors.past[i].any(1)) + 1:
            (k,), tensor = np.flatnonzero(rings[i] == i - lag), kept[i - lag]
            rows[f"h{1 + k}"][i] = factors.past[i, lag - 1] @ tensor / (tensor @ tensor)
    return rows


def rings_of(keeps: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The steps whose tensors each step may read, the last first, (steps, HISTORY); -1 for none. keeps: (steps,)."""
    kept = np.flatnonzero(keeps)
    places = (np.cumsum(keeps) - keeps)[:, None] - 1 - np.arange(HISTORY)
    return np.where(places < 0, -1, np.append(kept, -1)[np.maximum(places, 0)])


def columns_of(x: Array, m: Array, clean: Array) -> Columns:
    """The columns a, b, c0, c1 and c2 of rows with these factors of sample and output, (steps,) each. That of the
    output goes by way of the clean sample, if it can. clean: (steps, 2), a and b."""
    a, b = clean.T.copy()
    c0 = np.divide(m, b, out=np.zeros(len(x)), where=b != 0)
    c1 = x - c0 * a
    by_clean = (b != 0) & ((np.abs(c1) <= CANCELS * np.abs(x)) | (x == 0))
    c1 = np.where(by_clean, np.where(np.abs(c1) <= NEGLIGIBLE * np.abs(x), 0.0, c1), x)
    return {"a": a, "b": b, "c0": np.where(by_clean, c0, 0.0), "c1": c1, "c2": np.where(by_clean, 0.0, m)}


def terms_of(
    rows: Columns, loop: Numbers, noise: Sequence[int | None], history_draws: Sequence[Sequence[int]], bound: Bound
) -> tuple[Array, Array, Array]:
    """By the rows: each step's clean sample, (steps, count), its parts, (2, steps, count), and those of the step's
    result, (8, steps, count)."""
    x, m, column = loop.x, loop.m, {name: values[:, None] for name, values in rows.items()}
    parts = np.array([column["a"] * x, column["b"] * m])
    x0, terms = bound(parts.sum(0)), np.zeros((5 + HISTORY, *x.shape))
    of_last, c1 = column["of_last"], column["c1"] - column["of_last"]
    terms[:4] = column["c0"] * x0, c1 * x, column["c2"] * m, of_last * loop.last()
    kept = column["k0"] * x0 + column["k1"] * x + column["k2"] * m
    for k, ring in enumerate(rings_of((rows["k0"] != 0) | (rows["k1"] != 0) | (rows["k2"] != 0)).T):
        terms[5 + k] = np.where(ring[:, None] < 0, 0.0, column[f"h{1 + k}"] * kept[ring])
    for i, z in enumerate(loop.z):
        if noise[i] is not None:
            terms[4, i] = rows["s"][i] * z[noise[i]]
        for k, draw in enumerate(history_draws[i]):
            terms[5 + k, i] = rows[f"h{1 + k}"][i] * z[draw]
    return x0, parts, terms


def least_squares(columns: Array, target: Array, negligible: float = NEGLIGIBLE) -> tuple[Array, Array]:
    """The factors (steps, columns) of sums that are nearest to target, (steps, count), and what is left of each,
    relatively. columns: (steps, columns, count)."""
    sizes = np.sqrt((columns**2).sum(-1))
    scaled = columns / np.where(sizes > 0, sizes, 1.0)[..., None]
    length = np.maximum(np.sqrt((target**2).sum(-1)), 1e-300)[:, None]
    factors = (np.linalg.pinv(scaled.swapaxes(1, 2), rcond=1e-13) @ (target / length)[..., None])[..., 0]
    terms = factors[..., None] * scaled
    errors = relative(np.abs(target / length - terms.sum(1)), np.abs(terms).sum(1))
    factors[np.abs(factors) <= negligible * np.abs(factors).max(1, keepdims=True)] = 0
    factors = factors * length / np.where(sizes > 0, sizes, 1.0)
    whole = np.round(factors)
    return np.where((whole != 0) & (np.abs(factors - whole) <= negligible), whole, factors), errors


def relative(error: Array, parts: Array) -> Array:
    """The largest error of each row, relative to the sum of its parts' sizes. A NaN counts as infinite."""
    worst = error.max(-1) / np.maximum(parts.max(-1), 1e-300)
    return np.where(np.isfinite(worst), worst, np.inf)
