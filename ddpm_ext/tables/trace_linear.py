"""The rows of a sampler's steps, from what it makes of unit vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from ddpm_ext.tables.trace_batch import LINEAR, SLOTS, Array, Numbers, Trial, relative
from ddpm_ext.tables.trace_run import Run

HISTORY = 3  # tensors that a row may read
NEGLIGIBLE = 1e-12  # a number below this part of those that it is made of is 0
NAMES = ("a", "b", "c0", "c1", "c2", "s", "h1", "h2", "h3", "k0", "k1", "k2", "own")  # a step table's, and `Linear.own`

Columns = dict[str, Array]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def at(linear: Linear, i: SupportsIndex) -> str:
    return f"step {i}, at {linear.run.unit} {float(linear.run.times[int(i)]):g}"


class Linear:
    """Steps as sums of their inputs and of those of the steps before them.

    Attributes:
        prev: (steps, SLOTS, 2 + draws), the factors of sample, output and draws of this step, of the one before ...
        sizes: (steps,), the largest of these.
        kept: whether a step reads a sample that the scheduler has kept, by which it goes as far back as it likes. Then
            its factors in `prev` are those beside a part of the last step's result.
        clean: (steps, 2), a and b.
        noise: the number of the draw that is a step's z, or None.
        given: the numbers of the draws that a step reads beside that: tensors that it was given.
        second: whether each step's second tensor is a x + b m.
    """

    def __init__(self, run: Run, trial: Trial, second: Sequence[str] | None) -> None:
        """trial: of the run. second: as for `follow`."""
        self.run, self.trial, self.n = run, trial, len(run.times)
        self.prev, self.clean, self.second = trial.prev, np.zeros((self.n, 2)), False
        infinite = np.logical_not(np.isfinite(trial.prev).all(axis=(1, 2)))
        for i in np.flatnonzero(infinite | ~(np.abs(trial.zeros) <= LINEAR)):
            if infinite[i]:
                raise ValueError(f"{at(self, i)}, is not linear: its result is infinite or no number")
            raise ValueError(f"{at(self, i)}, is not linear: it makes {trial.zeros[i]:g} of zeros")
        names = [step.result.name for step in trial.steps]
        found = [i for i, x in enumerate(trial.second) if x is not None and (second is None or names[i] in second)]
        if found:
            factors = np.stack([x for i in found if (x := trial.second[i]) is not None])
            own, rest = factors[:, 0, :2].copy(), np.abs(factors)
            rest[:, 0, :2] = 0
            linear = rest.max((1, 2)) <= LINEAR * np.abs(own).max(1)
            self.clean[found] = np.where(linear[:, None], own, 0)
            self.second = len(found) == self.n and bool(linear.all())
        self.sizes = np.maximum(np.abs(self.prev).max((1, 2)), 1e-300)
        draws = [self._draws_of(i, step.draws, step.given) for i, step in enumerate(trial.steps)]
        self.noise = [z for z, _ in draws]
        self.given = [given for _, given in draws]
        self._steps = np.arange(self.n)
        self._z = np.array([-1 if z is None else z for z in self.noise])
        self.kept = self._reads_kept_samples(trial.loose)

    def _draws_of(self, i: int, draws: Sequence[object], given: int) -> tuple[int | None, list[int]]:
        """The draw that is a step's z, and the others that it reads, all among the first `given`."""
        if not draws:
            return None, []
        factors = self.prev[i, 0, 2 : 2 + len(draws)].tolist()
        used = [draw for draw, factor in enumerate(factors) if abs(factor) > NEGLIGIBLE * self.sizes[i]]
        drawn = [draw for draw in used if draw >= given]
        if len(drawn) > 1:
            raise ValueError(f"{at(self, i)}, adds {len(drawn)} draws of noise, expected at most 1")
        z = (drawn or used)[:1]
        return (z[0] if z else None), [draw for draw in used if draw not in z]

    def _reads_kept_samples(self, loose: Numbers) -> Bools:
        """`kept`, of samples that do not follow from each other. There, such a step's `prev` is found by least squares.
        Raises ValueError where a step is something else."""
        draws = loose.z.shape[1]
        inputs = np.concatenate([loose.x[:, None], loose.m[:, None], loose.z], 1)  # (steps, kinds, batch)
        found, size = np.zeros_like(loose.prev), np.zeros_like(loose.prev)
        for lag in range(min(SLOTS, self.n)):
            terms = self.prev[lag:, lag, : 2 + draws, None] * inputs[: self.n - lag]
            found[lag:] += terms.sum(1)
            size[lag:] += np.abs(terms).sum(1)
        is_sum = relative(np.abs(loose.prev - found), size) <= loose.bound()
        # What has an earlier step's noise in it is best read off beside the result that has it, too.
        kept = ~is_sum | (np.abs(self.prev[:, 1:, 2:]).max((1, 2)) > 10 * NEGLIGIBLE * self.sizes)
        if not kept.any():
            return kept
        i = np.flatnonzero(kept)
        last = np.concatenate([np.zeros((1, loose.x.shape[1])), loose.prev[:-1]])[:, None]
        lagged = [np.pad(inputs[: self.n - lag, :2], ((lag, 0), (0, 0), (0, 0))) for lag in range(1, HISTORY + 2)]
        noise = self.noise_of(loose)[i, None]
        columns = np.concatenate([last[i], inputs[i, :2], noise, *[each[i] for each in lagged]], 1)
        factors, errors = least_squares(columns, loose.prev[i])
        fits = errors <= loose.bound()
        for worst in np.flatnonzero(~fits & ~is_sum[i]):
            raise ValueError(
                f"{at(self, i[worst])}, is not linear: random numbers differ by {errors[worst]:.1e}, relatively; or it "
                f"reads more of the steps before it than a sample that is kept and {HISTORY + 1} others"
            )
        kept[i[~fits]] = False
        i, factors = i[fits], factors[fits]
        self.prev = self.prev.copy()
        self.prev[i] = 0
        self.prev[i, 0, :2] = factors[:, 1:3]
        self.prev[i, 0, np.maximum(2 + self._z[i], 2)] = np.where(self._z[i] < 0, 0.0, factors[:, 3])
        self.prev[i, 1 : HISTORY + 2, :2] = factors[:, 4:].reshape(len(i), HISTORY + 1, 2)
        self.prev[np.abs(self.prev) <= NEGLIGIBLE * self.sizes[:, None, None]] = 0
        return kept

    def noise_of(self, numbers: Numbers) -> Array:
        """Each step's z, (steps, batch), 0 where it has none."""
        if not numbers.z.shape[1]:
            return np.zeros_like(numbers.x)
        return np.where(self._z[:, None] < 0, 0.0, numbers.z[self._steps, self._z])

    def has_history(self, bound: float = LINEAR) -> bool:
        """Whether any step reads what earlier ones were called with."""
        rest = np.abs(self.prev[:, 1:]).max((1, 2), initial=0)
        return bool((rest > bound * self.sizes).any() or self.kept.any())

    # ------------------------------------------------------------------------------------------------------ rows

    def rows(self) -> Columns:
        """The columns NAMES, (steps,) each. Raises ValueError where a step needs more than rows can keep."""
        if not self.has_history(10 * NEGLIGIBLE):
            rows = self._columns(self.prev[:, 0, 0], self.prev[:, 0, 1])
            rows["s"] = self.noise_factors()
            self.put_given(rows)
            return rows
        rows = self._rows()
        return rows | {"own": self.own(rows)}

    def noise_factors(self) -> Array:
        return np.where(self._z < 0, 0.0, self.prev[self._steps, 0, 2 + np.maximum(self._z, 0)])

    def own(self, rows: Columns) -> Array:
        """The part of each row's factor of its sample that is one of the result of the step before, (steps,).

        A scheduler that keeps a sample does not read what somebody makes of its result: there, the sample stands for
        what the result was made of. NaN where the row with both parts is not what the step makes of any sample.
        """
        loose = self.trial.loose
        terms = terms_of(rows, self, loose)[2]
        rest = loose.prev - terms.sum(0)
        edits = np.zeros_like(rest)
        edits[1:] = loose.x[1:] - loose.prev[:-1]
        own = -(rest * edits).sum(1) / np.maximum((edits**2).sum(1), 1e-300)
        size = np.abs(terms).sum(0).max(1)
        own[np.abs(own) * np.abs(edits).max(1) <= 10 * loose.bound() * size] = 0
        return np.where(np.abs(rest + own[:, None] * edits).max(1) <= 10 * loose.bound() * size, own, np.nan)

    def put_given(self, rows: Columns, reads: Bools | None = None) -> None:
        """Writes the factors of tensors that steps were given. reads: which tensors of its ring each reads."""
        for i, given in enumerate(self.given):
            if len(given) > HISTORY or (given and reads is not None and reads[i].any()):
                raise ValueError(f"{at(self, i)}, reads {len(given)} given tensors beside those of earlier steps")
            for k, draw in enumerate(given):
                rows[f"h{1 + k}"][i] = self.prev[i, 0, 2 + draw]

    def _rows(self) -> Columns:
        error: ValueError | None = None
        for unread, both in itertools.product((False, True), (None, (0.0, 1.0), (1.0, 0.0))):
            keeps, kept = self._kept(both, unread)
            try:
                rows, used = self._fit(keeps, kept)
                if (used < keeps).any():  # what no row reads need not be kept
                    rows, _ = self._fit(keeps & used, kept)
                return rows
            except ValueError as failed:
                error = error or failed
        assert error is not None
        raise error

    def _kept(self, both: tuple[float, float] | None, unread: bool) -> tuple[Bools, Array]:
        """Which steps keep something for later ones, and what: the factors of their sample and output, (steps, 2).

        Args:
            both: the factors where later steps read the sample and the output in different proportions, so that one
                tensor is too few unless a later sample stands for the other; None: those of the step after it.
            unread: whether steps that no later one reads keep their part of the next sample, too: a later step may have
                to take that from its own sample.
        """
        steps = self._steps
        later = np.zeros((2, SLOTS, self.n))  # what the step after, and those after that, read of each
        for lag in range(1, min(SLOTS, self.n)):
            later[:, lag, :-lag] = (self.prev[lag:, lag, :2] / self.sizes[lag:, None]).T
        sizes = np.abs(later).max(0)
        # Where all are in one proportion, that of the largest is it.
        largest = sizes.argmax(0)
        direction = later[:, largest, steps].T
        across = later[0] * direction[:, 1] - later[1] * direction[:, 0]
        is_read = sizes[largest, steps] > NEGLIGIBLE
        is_one = np.abs(across).max(0) <= 1e-9 * (direction**2).sum(1)
        direction[~is_read] = self.prev[~is_read, 0, :2]
        kept, keeps = self._scaled(direction), is_read | unread
        keeps[-1] = False
        for j in np.flatnonzero(is_read & ~is_one)[::-1]:
            kept[j] = both or (kept[j + 1] if keeps[j + 1] else (0.0, 1.0))
        return keeps, kept

    def _scaled(self, direction: Array) -> Array:
        """The directions (steps, 2) in their simplest length: that of the clean sample, or with 1 as the larger
        factor."""
        clean = self.clean
        across = clean[:, 0] * direction[:, 1] - clean[:, 1] * direction[:, 0]
        lengths = np.sqrt((clean**2).sum(1)) * np.sqrt((direction**2).sum(1))
        is_clean: Bools = clean.any(1) & (np.abs(across) <= 1e-9 * lengths)
        scaled = np.where(np.abs(direction).max(1, keepdims=True) > 0, direction, [0.0, 1.0])
        scaled /= scaled[np.arange(self.n), np.abs(scaled).argmax(1)][:, None]
        scaled[np.abs(scaled) <= NEGLIGIBLE] = 0
        scaled[is_clean] = clean[is_clean]
        return scaled

    def _fit(self, keeps: Bools, kept: Array) -> tuple[Columns, Bools]:
        """The rows, and which steps' tensors they read. Raises ValueError where a step has no row.

        keeps, kept: as `_kept` gives them.
        """
        rings = rings_of(keeps)
        own, history, is_literal = self._literal(rings, kept)
        # A step that does not read its own sample may have got a copy of it: it reads what that is made of.
        to_fit = np.flatnonzero(~is_literal | self.kept | ((own[0] == 0) & (history != 0).any(0)))
        if len(to_fit):
            own[:, to_fit], history[:, to_fit] = self._fitted(to_fit, rings[to_fit], kept)
        rows = self._columns(own[0], own[1])
        rows |= {"s": own[2], "h1": history[0], "h2": history[1], "h3": history[2]}
        reads = history.T != 0
        self.put_given(rows, reads)
        by_clean = keeps & (kept == self.clean).all(1)
        rows["k0"][by_clean] = 1
        rows["k1"], rows["k2"] = np.where(keeps & ~by_clean, kept.T, 0.0)
        used = np.zeros(self.n, bool)
        used[rings[reads]] = True
        return rows, used

    def _literal(self, rings: Ints, kept: Array) -> tuple[Array, Array, Bools]:
        """The factors of each step's sample, output and noise, (3, steps), and of the tensors of its ring, (HISTORY,
        steps), where the sampler's code itself adds those; and whether that is all that it adds."""
        rest, steps = self.prev.copy(), self._steps
        own = np.stack([rest[:, 0, 0], rest[:, 0, 1], self.noise_factors()])
        rest[:, 0] = 0
        bounds = NEGLIGIBLE * self.sizes * 10
        history = np.zeros((HISTORY, self.n))
        for factors, ring in zip(history, rings.T, strict=True):
            lag = np.where((ring >= 0) & (steps - ring < SLOTS), steps - ring, 0)
            reads = np.flatnonzero(np.abs(rest[steps, lag, :2]).max(1) > bounds)
            (x, m), (a, b) = rest[reads, lag[reads], :2].T, kept[ring[reads]].T
            factors[reads] = (x * a + m * b) / (a * a + b * b)
            rest[reads, lag[reads], :2] -= (factors[reads] * [a, b]).T
        return own, history, np.abs(rest).max((1, 2)) <= bounds

    def _fitted(self, steps: Ints, rings: Ints, kept: Array) -> tuple[Array, Array]:
        """The factors of some steps' samples, outputs and noise, (3, steps), and of the tensors of their rings,
        (HISTORY, steps), by least squares, with as few of these as will do. rings: theirs."""
        loop = self.trial.follows
        tensors = kept[:, :1] * loop.x + kept[:, 1:] * loop.m
        columns = np.stack([loop.x, loop.m, self.noise_of(loop), *np.zeros((HISTORY, *loop.x.shape))], 1)[steps]
        columns[:, 3:] = np.where(rings[:, :, None] >= 0, tensors[rings], 0.0)
        given = np.stack([self.prev[i, 0, 2 + np.array(self.given[i], int)] @ loop.z[i, self.given[i]] for i in steps])
        found, least = np.zeros((len(steps), 3 + HISTORY)), np.full(len(steps), np.inf)
        left = self._steps[: len(steps)]
        for count in range(HISTORY + 1):
            for read in itertools.combinations(range(HISTORY), count):
                tried = left[(rings[left][:, list(read)] >= 0).all(1)]
                if not len(tried):
                    continue
                chosen = [0, 1, 2, *[3 + k for k in read]]
                factors, errors = least_squares(columns[tried][:, chosen], (loop.prev[steps] - given)[tried])
                least[tried] = np.minimum(least[tried], errors)
                fits = errors <= loop.bound()
                found[tried[fits][:, None], chosen] = factors[fits]
                left = left[~np.isin(left, tried[fits])]
        for i in left:
            raise ValueError(
                f"{at(self, steps[i])}, reads more of the steps before it than the {HISTORY} tensors that rows keep: "
                f"{least[i]:.1e} of it is left"
            )
        return found[:, :3].T, found[:, 3:].T

    def _columns(self, x: Array, m: Array) -> Columns:
        """All NAMES, those that `columns_of` does not know as zeros."""
        return {name: np.zeros(self.n) for name in NAMES} | columns_of(x, m, self.clean)


def rings_of(keeps: Bools) -> Ints:
    """The steps whose tensors each step may read, the last first, (steps, HISTORY); -1 for none. keeps: (steps,)."""
    kept = np.flatnonzero(keeps)
    before: Ints = np.cumsum(keeps) - keeps
    places = before[:, None] - 1 - np.arange(HISTORY)
    return np.where(places < 0, -1, np.append(kept, -1)[np.maximum(places, 0)])


def columns_of(x: Array, m: Array, clean: Array) -> Columns:
    """The columns a, b, c0, c1 and c2 of rows with these factors of sample and output, (steps,) each. That of the
    output goes by way of the clean sample, if it can. clean: (steps, 2), a and b."""
    a, b = clean.T.copy()
    c0 = np.divide(m, b, out=np.zeros(len(x)), where=b != 0)
    c1 = x - c0 * a
    by_clean = (b != 0) & ((np.abs(c1) <= 1e3 * np.abs(x)) | (x == 0))
    c1 = np.where(by_clean, np.where(np.abs(c1) <= NEGLIGIBLE * np.abs(x), 0.0, c1), x)
    return {"a": a, "b": b, "c0": np.where(by_clean, c0, 0.0), "c1": c1, "c2": np.where(by_clean, 0.0, m)}


def least_squares(columns: Array, target: Array) -> tuple[Array, Array]:
    """The factors (steps, columns) of sums that are nearest to target, (steps, batch), and what is left of each,
    relatively. columns: (steps, columns, batch)."""
    sizes = np.sqrt((columns**2).sum(-1))
    scaled = columns / np.where(sizes > 0, sizes, 1.0)[..., None]
    length = np.maximum(np.sqrt((target**2).sum(-1)), 1e-300)[:, None]
    inverse = np.linalg.pinv(scaled.swapaxes(1, 2), rcond=1e-13)
    factors = (inverse @ (target / length)[..., None])[..., 0]
    terms = factors[..., None] * scaled
    errors = relative(np.abs(target / length - terms.sum(1)), np.abs(terms).sum(1))
    factors[np.abs(factors) <= NEGLIGIBLE * np.abs(factors).max(1, keepdims=True)] = 0
    return factors * length / np.where(sizes > 0, sizes, 1.0), errors


def terms_of(
    rows: Columns, linear: Linear, loop: Numbers, bound: Callable[[Array], Array] = lambda x0: x0
) -> tuple[Array, Array, Array]:
    """By the rows: each step's clean sample, (steps, batch), its parts, (2, steps, batch), and those of the step's
    result, (7, steps, batch). bound: clips clean samples."""
    x, m, column = loop.x, loop.m, {name: values[:, None] for name, values in rows.items()}
    parts = np.array([column["a"] * x, column["b"] * m])
    x0 = bound(parts.sum(0))
    terms = np.zeros((4 + HISTORY, *x.shape))
    own = column["own"] * np.concatenate([0 * x[:1], loop.prev[:-1] - x[1:]])
    terms[:4] = column["c0"] * x0, column["c1"] * x + own, column["c2"] * m, column["s"] * linear.noise_of(loop)
    kept = column["k0"] * x0 + column["k1"] * x + column["k2"] * m
    rings = rings_of((rows["k0"] != 0) | (rows["k1"] != 0) | (rows["k2"] != 0))
    for k, ring in enumerate(rings.T):
        terms[4 + k] = np.where(ring[:, None] < 0, 0.0, column[f"h{1 + k}"] * kept[ring])
    for i, given in enumerate(linear.given):
        if given:
            terms[4:, i] = 0
            for k, draw in enumerate(given):
                terms[4 + k, i] = rows[f"h{1 + k}"][i] * loop.z[i, draw]
    return x0, parts, terms
