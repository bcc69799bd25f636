"""Computes the rows of a sampler's steps by least squares on random numbers.

A step may read its own sample, model output and noise, the samples and outputs of a few earlier steps, and the result
of the previous step. The previous result may contain everything that the sampler stores, such as an earlier sample. The
sample of each step is random and independent of the previous step's result, so that the fit can separate their factors.
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

HISTORY = 3  # the number of history tensors that a row may read
READS_MORE = f"reads more of the steps before it than the {HISTORY} tensors that rows keep"  # for error texts
LAGS = 5  # how many steps back a step may read: more than HISTORY, because some steps keep no tensor (PNDM's second)
DRAWS = 16  # the most tensors of noise that a step may draw
LINEAR_ERROR = 1e-9  # the largest relative residual of a linear step
# The largest relative residual for a sampler that computes in float32 although its inputs are float64.
FLOAT32_ERROR = 1e-5
NEGLIGIBLE = 1e-12  # a factor counts as 0 if it is smaller than this, relative to the numbers it is computed from
# A row uses c0 and not c2 if |c1| is at most this multiple of the sample's whole factor: else terms cancel.
MAX_CANCELLATION = 30.0
NAMES = ("a", "b", "c0", "c1", "c2", "s", "h1", "h2", "h3", "k0", "k1", "k2", "of_last")


class Numbers(NamedTuple):
    """The inputs and results of a loop on random numbers.

    Attributes:
        x, m, prev: (steps, count), the samples, model outputs and next samples, with `count` elements each.
        z: (steps, draws, count), the noise.
        second: (steps, count), the second tensors that steps return, or None if a step returns none.
        scaled: (steps, count), the results of scale_model_input, or None if it returned a sample itself.
        level: (steps,), the factor that makes samples larger than outputs. Rows are fitted to samples divided by it.
        is_float64: whether results are float64.
    """

    x: Array
    m: Array
    z: Array
    prev: Array
    second: Array | None
    scaled: Array | None
    level: Array
    is_float64: bool

    def unit(self) -> Array:
        """The samples divided by their level."""
        return self.x / self.level[:, None]

    def bound(self) -> float:
        """The largest relative residual with which a step counts as linear."""
        return LINEAR_ERROR if self.is_float64 else FLOAT32_ERROR

    def negligible(self) -> float:
        """The size below which a factor counts as 0, relative to the numbers that it is computed from."""
        return NEGLIGIBLE if self.is_float64 else FLOAT32_ERROR / 10

    def part(self, part: slice) -> Numbers:
        """The numbers of some of the elements, those of the slice `part` of `count`."""
        x, m, z, prev = (array[..., part] for array in self[:4])
        second, scaled = (None if array is None else array[:, part] for array in (self.second, self.scaled))
        return Numbers(x, m, z, prev, second, scaled, self.level, self.is_float64)

    def last_results(self) -> Array:
        """The previous step's result for each step; zeros for the first step."""
        return np.concatenate([np.zeros_like(self.prev[:1]), self.prev[:-1]])


def numbers_of(
    run: Run, shape: tuple[int, ...], inputs: Callable[[int], Array], level: Array
) -> tuple[Numbers, list[Step]]:
    """Runs a loop on random inputs, and returns its numbers and what each step did.

    Args:
        shape: the samples' shape.
        inputs: inputs(kind) makes random numbers (steps, count). Kind 0 is samples before their factor `level`, kind 1
            model outputs, and kind 2 + k each step's k-th draw of noise.
        level: see Numbers.
    """
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
        raise ValueError(f"{step_label(run, i)}, is not linear: its result is infinite or no number")
    second, scaled = (stacked(tensors, shape) for tensors in ([s.second for s in steps], [s.scaled for s in steps]))
    is_float64 = all(step.prev.dtype == torch.float64 for step in steps)
    return Numbers(kinds[0], kinds[1], z, prev, second, scaled, level, is_float64), steps


def flat(x: Tensor, shape: tuple[int, ...]) -> Array:
    """The elements of a step's result, (count,). Raises ValueError if it does not have the samples' shape."""
    if x.shape != shape:
        raise ValueError(f"a step returns a tensor of shape {tuple(x.shape)} for samples of shape {shape}")
    return np.asarray(x.double().numpy(force=True).reshape(-1))


def stacked(tensors: Sequence[Tensor | None], shape: tuple[int, ...]) -> Array | None:
    """The tensors as (steps, count); None if any of them is None."""
    arrays = [flat(x, shape) for x in tensors if x is not None]
    return np.stack(arrays) if len(arrays) == len(tensors) else None


class Factors(NamedTuple):
    """The factors of the terms whose sum is a step's result. Samples are those of Numbers.unit.

    Attributes:
        x0: (steps,), of the clean sample, or 0 if it is not clipped.
        x, m: (steps,), of the step's sample and model output.
        z: (steps, draws), of its draws of noise.
        past: (steps, LAGS, 2), of the samples and outputs of earlier steps, the latest step first.
        of_last: (steps,), of the previous step's result.
    """

    x0: Array
    x: Array
    m: Array
    z: Array
    past: Array
    of_last: Array


def factors_of(run: Run, loop: Numbers) -> Factors:
    """The factors of steps that do not clip. Raises ValueError if a step is not a sum of the terms of Factors."""
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
    """The factors of steps that clip their clean samples and read nothing of other steps.

    x0: (steps, count), the clipped clean samples.
    """
    fitted, n = _fit(run, loop, [np.stack([x0, loop.unit(), loop.m, *loop.z.swapaxes(0, 1)], 1)]), len(x0)
    return Factors(fitted[:, 0], fitted[:, 1], fitted[:, 2], fitted[:, 3:], np.zeros((n, LAGS, 2)), np.zeros(n))


def _without_last(run: Run, loop: Numbers) -> Factors:
    """The factors of steps that read a few earlier steps and not the previous step's result.

    A function's steps (run.follows_previous) are an exception: they may start from the previous step's result in place
    of their own sample. Here they may read this result if they read nothing else of earlier steps.
    """
    n, k = len(loop.x), loop.z.shape[1]
    columns_of_step, last_results = [loop.unit(), loop.m, *loop.z.swapaxes(0, 1)], loop.last_results()
    past = [column for pair in zip(lagged(loop.unit()), lagged(loop.m), strict=True) for column in pair]
    tries = [columns_of_step, [*columns_of_step, last_results]] if run.follows_previous else [columns_of_step]
    fitted = _fit(
        run, loop, [np.stack(columns, 1) for columns in (*tries, [*columns_of_step, 0 * last_results, *past])]
    )
    fitted = np.pad(fitted, ((0, 0), (0, 3 + k + 2 * LAGS - fitted.shape[1])))
    x, m, z, of_last, read = np.split(fitted, [1, 2, 2 + k, 3 + k], axis=1)
    return Factors(np.zeros(n), x[:, 0], m[:, 0], z, read.reshape(n, LAGS, 2), of_last[:, 0])


def _with_last(run: Run, loop: Numbers) -> Factors:
    """The factors of steps that read the previous step's result, fitted from the last step to the first.

    All later steps read the same combination of a step's sample and output, up to a factor. Once one later step has
    been fitted, the direction (factor of the sample, factor of the output) is known for all of them. Each step is
    fitted with as few inputs as suffice: an early step's result is itself a sum of inputs of earlier steps, so that
    with all of these as inputs the factors would not be unique.
    """
    n, k, last_results = len(loop.x), loop.z.shape[1], loop.last_results()
    zeros = np.zeros(n)
    factors = Factors(zeros, zeros.copy(), zeros.copy(), np.zeros((n, k)), np.zeros((n, LAGS, 2)), zeros.copy())
    # {step: the direction that later steps read, factors of the step's sample and output}
    known_directions: dict[int, Array] = {}
    inputs, last_try = np.stack([loop.unit(), loop.m], 1), (0, False)

    def try_fit(i: int, lags: int, with_last: bool, free: bool) -> float:
        """Fits step i with inputs of `lags` earlier steps, writes its factors, and returns the relative error.

        free: fit both the sample and the output of earlier steps in place of the known directions, whose errors would
            add up over a loop. The result must agree with the known directions.
        """
        read = [
            (lag, d)
            for lag in range(1, lags + 1)
            for d in (np.eye(2) if free else known_directions.get(i - lag, np.eye(2)))
        ]
        columns = [
            *inputs[i],
            *loop.z[i],
            *[d @ inputs[i - lag] for lag, d in read],
            *[last_results[i]] * with_last,
        ]
        (fitted,), (error,) = least_squares(np.stack(columns)[None], loop.prev[i : i + 1], loop.negligible())
        past = np.zeros((LAGS, 2))
        for (lag, d), factor in zip(read, fitted[2 + k :], strict=False):
            past[lag - 1] += factor * d
        known_lags = [lag for lag in range(1, lags + 1) if i - lag in known_directions]
        if free and not all(is_multiple(past[lag - 1], known_directions[i - lag][0]) for lag in known_lags):
            return np.inf
        factors.x[i], factors.m[i], factors.z[i], factors.past[i] = fitted[0], fitted[1], fitted[2 : 2 + k], past
        factors.of_last[i] = fitted[-1] if with_last else 0
        return float(error)

    for i in reversed(range(n)):
        tries = [(lags, with_last) for lags in range(min(LAGS, i) + 1) for with_last in (False, True)]
        for (lags, with_last), free in itertools.product([last_try, *tries] if i > LAGS else tries, (True, False)):
            if (error := try_fit(i, lags, with_last, free)) <= loop.bound():
                break
        else:
            raise ValueError(refusal(run, i, error))
        last_try = lags, with_last
        for lag in np.flatnonzero(factors.past[i].any(1)) + 1:
            before = known_directions.get(i - lag, np.zeros((1, 2)))
            known_directions[i - lag] = max(before, factors.past[i, lag - 1][None], key=np.linalg.norm)
    return factors


def is_multiple(pair: Array, direction: Array) -> bool:
    """Whether the vector `pair` is a multiple of the vector `direction`, up to rounding."""
    across = abs(pair[0] * direction[1] - pair[1] * direction[0])
    return bool(across <= 1e-6 * np.linalg.norm(pair) * np.linalg.norm(direction))


def lagged(values: Array) -> list[Array]:
    """For each lag, the values of the step that is `lag` steps earlier; zeros where there is none."""
    return [np.pad(values, ((lag, 0), (0, 0)))[: len(values)] for lag in range(1, min(LAGS, len(values) - 1) + 1)]


def _fit(run: Run, loop: Numbers, tries: Sequence[Array]) -> Array:
    """Expresses each step's result as a weighted sum of columns, whose factors are fitted by least squares.

    A step uses the first entry of `tries` with a relative error of at most loop.bound().

    Args:
        tries: arrays (steps, columns, count). A column has the numbers that a step may read, such as its sample. An
            array may have more columns than the previous try; a column that both have is the same or 0.

    Returns:
        The factors, (steps, columns of the last try); zeros for columns that a step did not need.

    Raises:
        ValueError: no try fits a step.
    """
    fitted, unfitted, errors = np.zeros(tries[-1].shape[:2]), np.arange(len(loop.x)), np.zeros(0)
    for columns in tries:
        factors, errors = least_squares(columns[unfitted], loop.prev[unfitted], loop.negligible())
        try_fit = errors <= loop.bound()
        fitted[unfitted[try_fit], : columns.shape[1]] = factors[try_fit]
        unfitted, errors = unfitted[~try_fit], errors[~try_fit]
        if not len(unfitted):
            return fitted
    raise ValueError(refusal(run, unfitted[0], errors[0]))


def step_label(run: Run, i: Any) -> str:
    """The name of step i in error texts."""
    return f"step {i}, at {run.unit} {float(run.times[int(i)]):g}"


def refusal(run: Run, i: Any, error: float) -> str:
    """The error's text for a step that no row fits, with this relative error."""
    return f"{step_label(run, i)}, is not linear: random numbers differ by {error:.1e}, relatively; or it {READS_MORE}"


def directions_of(run: Run, past: Array, negligible: float) -> tuple[Array, npt.NDArray[np.int64]]:
    """Returns each step's direction, (steps, 2), and history_steps_of the steps that later steps read.

    A step's direction is the factors of its sample and output in the tensor that later steps read of it, or zeros if no
    later step reads it. Raises ValueError if later steps read different directions of a step, or if a step would need
    more than HISTORY tensors.
    """
    n, direction = len(past), np.zeros((len(past), 2))
    lags = range(1, min(LAGS, n - 1) + 1)
    for lag in lags:
        larger = np.abs(past[lag:, lag - 1]).max(1) > np.abs(direction[:-lag]).max(1)
        direction[:-lag][larger] = past[lag:, lag - 1][larger]
    keeps = np.asarray(direction.any(1))
    history_steps = history_steps_of(keeps)
    for lag in lags:
        pair, read = past[lag:, lag - 1], direction[:-lag]
        across = np.abs(pair[:, 0] * read[:, 1] - pair[:, 1] * read[:, 0])
        for i in np.flatnonzero(across > 1e3 * negligible * (read**2).sum(1)):
            raise ValueError(
                f"{step_label(run, i)}, is read by later ones in several proportions of its sample and output"
            )
        too_far = pair.any(1) & (history_steps[lag:] != np.arange(n - lag)[:, None]).all(1)
        for i in np.flatnonzero(too_far) + lag:
            raise ValueError(f"{step_label(run, i)}, {READS_MORE}")
    return direction, history_steps


def rows_of(run: Run, loop: Numbers, factors: Factors, clean: Array, noise: Sequence[int | None]) -> Columns:
    """The columns NAMES. Raises the errors of directions_of.

    clean: (steps, 2), a and b of each step's clean sample.
    noise: for each step, the number of the draw that is its z, or None.
    """
    direction, history_steps = directions_of(run, factors.past, loop.negligible())
    keeps = direction.any(1)
    lengths = np.sqrt((clean**2).sum(1) * (direction**2).sum(1))
    across = np.abs(clean[:, 0] * direction[:, 1] - clean[:, 1] * direction[:, 0])
    by_clean = keeps & clean.any(1) & (across <= 1e3 * loop.negligible() * lengths)
    largest = np.take_along_axis(direction, np.abs(direction).argmax(1)[:, None], 1)
    stored = np.where(by_clean[:, None], clean, direction / np.where(largest == 0, 1, largest))
    stored[np.abs(stored) <= loop.negligible()] = 0
    n = len(loop.x)
    rows = {name: np.zeros(n) for name in NAMES} | columns_of(factors.x, factors.m, clean)
    if factors.x0.any():
        rows |= {"c0": factors.x0, "c1": factors.x, "c2": factors.m}
    rows["s"] = np.array([0.0 if k is None else factors.z[i, k] for i, k in enumerate(noise)])
    rows["c1"], rows["of_last"] = rows["c1"] / loop.level + factors.of_last, factors.of_last
    rows["k0"] = by_clean.astype(float)
    rows["k1"], rows["k2"] = np.where(keeps & ~by_clean, stored.T, 0.0)
    rows["k1"], rows["a"] = rows["k1"] / loop.level, rows["a"] / loop.level
    for i in range(n):
        for lag in np.flatnonzero(factors.past[i].any(1)) + 1:
            (k,), tensor = np.flatnonzero(history_steps[i] == i - lag), stored[i - lag]
            rows[f"h{1 + k}"][i] = factors.past[i, lag - 1] @ tensor / (tensor @ tensor)
    return rows


def history_steps_of(keeps: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each step, the earlier steps whose kept tensors it can read, the latest first: (steps, HISTORY), -1 for none.

    keeps: (steps,), whether a step keeps a tensor.
    """
    storing_steps = np.flatnonzero(keeps)
    positions = (np.cumsum(keeps) - keeps)[:, None] - 1 - np.arange(HISTORY)
    return np.where(positions < 0, -1, np.append(storing_steps, -1)[np.maximum(positions, 0)])


def columns_of(x: Array, m: Array, clean: Array) -> Columns:
    """The columns a, b, c0, c1 and c2 of rows with these factors of sample and output, (steps,) each.

    The output enters through the clean sample (c0), or through c2 where b is 0 or the terms would cancel.

    clean: (steps, 2), a and b.
    """
    a, b = clean.T.copy()
    c0 = np.divide(m, b, out=np.zeros(len(x)), where=b != 0)
    c1 = x - c0 * a
    by_clean = (b != 0) & ((np.abs(c1) <= MAX_CANCELLATION * np.abs(x)) | (x == 0))
    c1 = np.where(by_clean, np.where(np.abs(c1) <= NEGLIGIBLE * np.abs(x), 0.0, c1), x)
    return {"a": a, "b": b, "c0": np.where(by_clean, c0, 0.0), "c1": c1, "c2": np.where(by_clean, 0.0, m)}


def terms_of(
    rows: Columns, loop: Numbers, noise: Sequence[int | None], history_draws: Sequence[Sequence[int]], bound: Bound
) -> tuple[Array, Array, Array]:
    """The numbers that the rows compute on the inputs of a loop.

    noise: see rows_of.
    history_draws: for each step, the numbers of the draws that its row reads as history, the first one as H1.

    Returns:
        The predicted clean samples, (steps, count), bounded by `bound`; their two terms a x and b m, (2, steps, count);
        and the terms of the steps' results, (8, steps, count).
    """
    x, m, column = loop.x, loop.m, {name: values[:, None] for name, values in rows.items()}
    parts = np.array([column["a"] * x, column["b"] * m])
    x0, terms = bound(parts.sum(0)), np.zeros((5 + HISTORY, *x.shape))
    of_last, c1 = column["of_last"], column["c1"] - column["of_last"]
    terms[:4] = column["c0"] * x0, c1 * x, column["c2"] * m, of_last * loop.last_results()
    stored = column["k0"] * x0 + column["k1"] * x + column["k2"] * m
    for k, history_step in enumerate(history_steps_of((rows["k0"] != 0) | (rows["k1"] != 0) | (rows["k2"] != 0)).T):
        terms[5 + k] = np.where(history_step[:, None] < 0, 0.0, column[f"h{1 + k}"] * stored[history_step])
    for i, z in enumerate(loop.z):
        if noise[i] is not None:
            terms[4, i] = rows["s"][i] * z[noise[i]]
        for k, draw in enumerate(history_draws[i]):
            terms[5 + k, i] = rows[f"h{1 + k}"][i] * z[draw]
    return x0, parts, terms


def least_squares(columns: Array, target: Array, negligible: float = NEGLIGIBLE) -> tuple[Array, Array]:
    """Fits each step's target by a sum of its columns, by least squares.

    Args:
        columns: (steps, columns, count).
        target: (steps, count).

    Returns:
        The factors, (steps, columns), and the relative errors, (steps,).
    """
    sizes = np.sqrt((columns**2).sum(-1))
    scaled = columns / np.where(sizes > 0, sizes, 1.0)[..., None]
    length = np.maximum(np.sqrt((target**2).sum(-1)), 1e-300)[:, None]
    factors = (np.linalg.pinv(scaled.swapaxes(1, 2), rcond=1e-13) @ (target / length)[..., None])[..., 0]
    terms = factors[..., None] * scaled
    errors = relative_error(np.abs(target / length - terms.sum(1)), np.abs(terms).sum(1))
    factors[np.abs(factors) <= negligible * np.abs(factors).max(1, keepdims=True)] = 0
    factors = factors * length / np.where(sizes > 0, sizes, 1.0)
    rounded = np.round(factors)
    return np.where((rounded != 0) & (np.abs(factors - rounded) <= negligible), rounded, factors), errors


def relative_error(error: Array, parts: Array) -> Array:
    """The largest error of each row, relative to the largest of `parts`. A NaN counts as infinite.

    parts: like `error`, the sums of the magnitudes of the terms.
    """
    largest_error = error.max(-1) / np.maximum(parts.max(-1), 1e-300)
    return np.where(np.isfinite(largest_error), largest_error, np.inf)
