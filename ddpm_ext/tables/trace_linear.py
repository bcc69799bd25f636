"""The rows of a sampler's steps, from what it makes of unit vectors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from ddpm_ext.tables.trace_batch import LINEAR, Array, Numbers, Trial, relative
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
    """Steps as sums of their inputs: the samples x_0 .. x_n-1, the outputs m_0 .. m_n-1, and all noise, in this order.

    Attributes:
        prev: (steps, inputs), the factors of each in the next sample.
        clean: (steps, 2), a and b.
        noise: the number of the draw that is a step's z, or None.
        given: the numbers of the draws that a step reads beside that: tensors that it was given.
        second: whether each step's second tensor is a x + b m.
    """

    def __init__(self, run: Run, trial: Trial, second: Sequence[str] | None) -> None:
        """trial: of the run. second: as for `follow`."""
        self.run, n = run, len(run.times)
        self.n = n
        counts = [len(step.draws) for step in trial.steps]
        self.first_draw = 2 * n + np.cumsum([0, *counts])  # of each step, among the inputs
        self.prev, self.clean, self.second = trial.prev, np.zeros((n, 2)), False
        for i in np.flatnonzero(~np.isfinite(trial.prev).all(1) | ~(np.abs(trial.zeros) <= LINEAR)):
            if not np.isfinite(trial.prev[i]).all():
                raise ValueError(f"{at(self, i)}, is not linear: its result is infinite or no number")
            raise ValueError(f"{at(self, i)}, is not linear: it makes {trial.zeros[i]:g} of zeros")
        names = [step.result.name for step in trial.steps]
        found = [i for i, x in enumerate(trial.second) if x is not None and (second is None or names[i] in second)]
        if found:
            factors = np.stack([x for i in found if (x := trial.second[i]) is not None])
            own_places = np.arange(len(found))[:, None], np.array([found, np.add(found, n)]).T
            own, rest = factors[own_places], np.abs(factors)
            rest[own_places] = 0
            linear = rest.max(1) <= LINEAR * np.abs(own).max(1)
            self.clean[found] = np.where(linear[:, None], own, 0)
            self.second = len(found) == n and bool(linear.all())
        bounds = (NEGLIGIBLE * np.abs(self.prev).max(1)).tolist()
        draws = [self._draws_of(i, counts[i], step.given, bounds[i]) for i, step in enumerate(trial.steps)]
        self.noise = [z for z, _ in draws]
        self.given = [given for _, given in draws]

    def _draws_of(self, i: int, draws: int, given: int, bound: float) -> tuple[int | None, list[int]]:
        """The draw that is a step's z, and the others that it reads, all among the first `given`. bound: what the
        factors of those exceed."""
        factors = self.prev[i, self.first_draw[i] : self.first_draw[i] + draws].tolist()
        used = [draw for draw, factor in enumerate(factors) if abs(factor) > bound]
        drawn = [draw for draw in used if draw >= given]
        if len(drawn) > 1:
            raise ValueError(f"{at(self, i)}, adds {len(drawn)} draws of noise, expected at most 1")
        z = (drawn or used)[:1]
        return (z[0] if z else None), [draw for draw in used if draw not in z]

    def column(self, i: int) -> int | None:
        """The input that is step i's z."""
        draw = self.noise[i]
        return None if draw is None else int(self.first_draw[i]) + draw

    def given_columns(self, i: int) -> list[int]:
        """The inputs that step i was given in the place of history."""
        return [int(self.first_draw[i]) + draw for draw in self.given[i]]

    def has_history(self, bound: float = LINEAR) -> bool:
        """Whether any step reads what earlier ones were called with."""
        rest = np.abs(self.prev)
        largest = rest.max(1)
        steps = np.arange(self.n)
        rest[steps, steps] = rest[steps, self.n + steps] = 0
        for i in range(self.n):
            rest[i, self.first_draw[i] : self.first_draw[i + 1]] = 0
        return bool((rest.max(1) > bound * largest).any())

    def prove(self, numbers: Numbers) -> None:
        """Raises ValueError where a step on random numbers is not the sum that it was on unit vectors."""
        inputs = np.concatenate([numbers.x, numbers.m, *numbers.z])
        worst = relative(np.abs(numbers.prev - self.prev @ inputs), np.abs(self.prev) @ np.abs(inputs))
        for i in np.flatnonzero(~(worst <= numbers.bound())):
            raise ValueError(f"{at(self, i)}, is not linear: random numbers differ by {worst[i]:.1e}, relatively")

    # ------------------------------------------------------------------------------------------------------ rows

    def rows(self) -> Columns:
        """The columns NAMES, (steps,) each. Raises ValueError where a step needs more than rows can keep."""
        if not self.has_history(10 * NEGLIGIBLE):
            return self._rows_without_history()
        try:
            rows = self._rows()
        except ValueError as error:
            other = copy.copy(self)
            other.prev = self._without_past_noise()
            try:
                rows = other._rows()  # noqa: SLF001 (of this module)
            except ValueError:
                raise error from None
        return rows | {"own": self.own(rows)}

    def own(self, rows: Columns) -> Array:
        """The part of each row's factor of its sample that is one of the result of the step before, (steps,).

        A scheduler that keeps a sample does not read what somebody makes of its result: there, the sample stands for
        what the result was made of. NaN where the row with both parts is not what the step makes of any sample.
        """
        n, steps = self.n, np.arange(self.n)
        factors, kept = (
            (rows[clean] * rows["a"] + rows[x], rows[clean] * rows["b"] + rows[m])
            for clean, x, m in (("c0", "c1", "c2"), ("k0", "k1", "k2"))
        )
        sizes = np.abs(self.prev).max(1)
        own = factors[0] - self.prev[steps, steps]
        own[np.abs(own) <= LINEAR * sizes] = 0
        rest = self.prev.copy()
        rest[steps, steps] -= factors[0] - own
        rest[steps, n + steps] -= factors[1]
        rest[1:] -= own[1:, None] * self.prev[:-1]
        sizes[1:] += np.abs(own[1:]) * sizes[:-1]
        for i in range(n):
            z, given = self.column(i), self.given_columns(i)
            if z is not None:
                rest[i, z] -= rows["s"][i]
            rest[i, given] = 0
        rings = rings_of((rows["k0"] != 0) | (rows["k1"] != 0) | (rows["k2"] != 0))
        rings[[i for i, given in enumerate(self.given) if given]] = -1
        for k, ring in enumerate(rings.T):
            reads = np.flatnonzero(ring >= 0)
            j, factor = ring[reads], rows[f"h{1 + k}"][reads]
            rest[reads, j] -= factor * kept[0][j]
            rest[reads, n + j] -= factor * kept[1][j]
        return np.where(np.abs(rest).max(1) <= 10 * LINEAR * sizes, own, np.nan)

    def _rows_without_history(self) -> Columns:
        steps = np.arange(self.n)
        z = np.array([-1 if column is None else column for column in map(self.column, range(self.n))])
        rows = self._columns(self.prev[steps, steps], self.prev[steps, self.n + steps])
        rows["s"] = np.where(z < 0, 0.0, self.prev[steps, z])
        self._put_given(rows)
        return rows

    def _put_given(self, rows: Columns, reads: Bools | None = None) -> None:
        """Writes the factors of tensors that steps were given. reads: which tensors of its ring each reads."""
        for i, given in enumerate(self.given):
            if len(given) > HISTORY or (given and reads is not None and reads[i].any()):
                raise ValueError(f"{at(self, i)}, reads {len(given)} given tensors beside those of earlier steps")
            for k, column in enumerate(self.given_columns(i)):
                rows[f"h{1 + k}"][i] = self.prev[i, column]

    def _without_past_noise(self) -> Array:
        """`prev`, where the noise of an earlier step is written as the next step's sample less all else in it; behind a
        step without noise, as the last result less all else in it, which a scheduler that keeps a sample has in it."""
        prev = self.prev.copy()
        for i in range(self.n):
            for j in reversed(range(i)):
                z = self.column(j)
                if z is not None and prev[i, z]:
                    k = i - 1 if self.column(i - 1) is None and self.prev[i - 1, z] else j
                    factor = prev[i, z] / self.prev[k, z]
                    prev[i] -= factor * self.prev[k]
                    prev[i, k + 1] += factor
        return prev

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
        n, steps = self.n, np.arange(self.n)
        scale = np.maximum(np.abs(self.prev).max(1), 1e-300)
        later = np.stack([self.prev[:, :n], self.prev[:, n : 2 * n]]) / scale[:, None]  # what step i reads of step j
        later *= steps[:, None] > steps
        sizes = np.abs(later).max(0)
        # Where all are in one proportion, that of the largest is it.
        largest = sizes.argmax(0)
        direction = later[:, largest, steps].T
        across = later[0] * direction[:, 1] - later[1] * direction[:, 0]
        is_read = sizes[largest, steps] > NEGLIGIBLE
        is_one = np.abs(across).max(0) <= 1e-9 * (direction**2).sum(1)
        direction[~is_read] = self.prev[steps, [steps, n + steps]].T[~is_read]
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
        n, inputs = self.n, self.prev.shape[1]
        rings = rings_of(keeps)
        own, history, is_literal = self._literal(rings, kept)
        # A step that does not read its own sample may have got a copy of it: it reads what that is made of.
        to_fit = np.flatnonzero(~is_literal | ((own[0] == 0) & (history != 0).any(0)))
        samples = np.zeros((1 + max(to_fit, default=-1) + 1, inputs))  # each as a sum of x_0, the outputs and the noise
        samples[0, 0] = 1
        tensors = np.zeros_like(samples)
        for i in range(len(samples) - 1):
            samples[i + 1, n:] = self.prev[i, n:]
            samples[i + 1] += self.prev[i, : i + 1] @ samples[: i + 1]
            tensors[i] = kept[i, 0] * samples[i]
            tensors[i, n + i] += kept[i, 1]
        for i in to_fit.tolist():
            ring = [j for j in rings[i].tolist() if j >= 0]
            own[:, i], history[:, i] = self._fitted(i, samples, tensors[ring])
        rows = self._columns(own[0], own[1])
        rows |= {"s": own[2], "h1": history[0], "h2": history[1], "h3": history[2]}
        reads = history.T != 0
        self._put_given(rows, reads)
        by_clean = keeps & (kept == self.clean).all(1)
        rows["k0"][by_clean] = 1
        rows["k1"], rows["k2"] = np.where(keeps & ~by_clean, kept.T, 0.0)
        used = np.zeros(n, bool)
        used[rings[reads]] = True
        return rows, used

    def _literal(self, rings: Ints, kept: Array) -> tuple[Array, Array, Bools]:
        """The factors of each step's sample, output and noise, (3, steps), and of the tensors of its ring, (HISTORY,
        steps), where the sampler's code itself adds those; and whether that is all that it adds."""
        n, steps = self.n, np.arange(self.n)
        rest, own = self.prev.copy(), np.zeros((3, self.n))
        own[:2] = rest[steps, steps], rest[steps, n + steps]
        rest[steps, steps] = rest[steps, n + steps] = 0
        for i in range(n):
            z = self.column(i)
            if z is not None:
                own[2, i], rest[i, z] = rest[i, z], 0
            rest[i, self.given_columns(i)] = 0
        bounds = NEGLIGIBLE * np.maximum(np.abs(self.prev).max(1), 1e-300) * 10
        history = np.zeros((HISTORY, n))
        for factors, ring in zip(history, rings.T, strict=True):
            x, m = rest[steps, ring], rest[steps, n + ring]
            reads = np.flatnonzero((ring >= 0) & (np.maximum(np.abs(x), np.abs(m)) > bounds))
            j, x, m, (a, b) = ring[reads], x[reads], m[reads], kept[ring[reads]].T
            factors[reads] = (x * a + m * b) / (a * a + b * b)
            rest[reads, j], rest[reads, n + j] = x - factors[reads] * a, m - factors[reads] * b
        return own, history, np.abs(rest).max(1) <= bounds

    def _fitted(self, i: int, samples: Array, ring: Array) -> tuple[list[float], list[float]]:
        """The factors of a step's sample, output and noise, and of the HISTORY tensors of its ring, by least squares,
        with as few of these as will do. ring: (tensors, inputs)."""
        target, sample, z = samples[i + 1], samples[i], self.column(i)
        places = [self.n + i, *([] if z is None else [z])]  # of output and noise, which the sample has not in it
        own = np.zeros((1 + len(places), len(target)))
        own[0] = sample
        own[np.arange(1, len(own)), places] = 1
        alone = target - target @ sample / max(sample @ sample, 1e-300) * sample
        alone[places] = 0
        residual = float(relative(np.abs(alone), np.abs(target)))
        for count in range(residual > 2 * LINEAR, len(ring) + 1):
            for read in itertools.combinations(range(len(ring)), count):
                columns = np.concatenate([own, ring[list(read)]]).T.copy()
                sizes = np.maximum(np.sqrt((columns**2).sum(0)), 1e-300)
                factors = np.linalg.lstsq(columns / sizes, target, rcond=1e-13)[0] / sizes
                error = float(relative(np.abs(target - columns @ factors), np.abs(columns) @ np.abs(factors)))
                residual = min(residual, error)
                if error <= LINEAR:
                    history = np.zeros(HISTORY)
                    history[list(read)] = factors[len(own) :]
                    return [*factors[: len(own)].tolist(), 0.0][:3], history.tolist()
        raise ValueError(
            f"{at(self, i)}, reads more of the steps before it than the {HISTORY} tensors that rows keep: "
            f"{residual:.1e} of it is left"
        )

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
