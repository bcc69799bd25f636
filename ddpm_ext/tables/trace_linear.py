"""The rows of a sampler's steps, from what it makes of unit vectors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import numpy as np

from ddpm_ext.tables.trace_batch import LINEAR, Array, Numbers, Trial, relative
from ddpm_ext.tables.trace_run import Run

HISTORY = 3  # tensors that a row may read
NEGLIGIBLE = 1e-12  # a number below this part of those that it is made of is 0
NAMES = ("a", "b", "c0", "c1", "c2", "s", "h1", "h2", "h3", "k0", "k1", "k2", "own")  # a step table's, and `Linear.own`

Columns = dict[str, Array]
Factors = tuple[float, float, float, dict[int, float]]  # of sample, output, noise, and the tensors kept by steps


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
        ring: list[int] = []
        for i in range(n):
            z, given = self.column(i), self.given_columns(i)
            if z is not None:
                rest[i, z] -= rows["s"][i]
            rest[i, given] = 0
            for k, j in enumerate(() if given else ring):
                rest[i, [j, n + j]] -= rows[f"h{1 + k}"][i] * np.array([kept[0][j], kept[1][j]])
            if rows["k0"][i] or rows["k1"][i] or rows["k2"][i]:
                ring = [i, *ring][:HISTORY]
        return np.where(np.abs(rest).max(1) <= 10 * LINEAR * sizes, own, np.nan)

    def _rows_without_history(self) -> Columns:
        steps = np.arange(self.n)
        z = np.array([-1 if column is None else column for column in map(self.column, range(self.n))])
        rows = self._columns(self.prev[steps, steps], self.prev[steps, self.n + steps])
        rows["s"] = np.where(z < 0, 0.0, self.prev[steps, z])
        self._put_given(rows)
        return rows

    def _put_given(self, rows: Columns, reads: Sequence[Sequence[int]] | None = None) -> None:
        """Writes the factors of tensors that steps were given. reads: the earlier steps whose tensors each reads."""
        for i, given in enumerate(self.given):
            if len(given) > HISTORY or (given and reads is not None and reads[i]):
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
            keeps = self._kept(both, unread)
            try:
                rows, reads = self._fit(keeps)
                used = {j for read in reads for j in read}
                if used < keeps.keys():  # what no row reads need not be kept
                    rows, _ = self._fit({j: keep for j, keep in keeps.items() if j in used})
                return rows
            except ValueError as failed:
                error = error or failed
        assert error is not None
        raise error

    def _kept(self, both: tuple[float, float] | None, unread: bool) -> dict[int, tuple[float, float]]:
        """What steps keep for later ones: the factors of their sample and output.

        Args:
            both: the factors where later steps read the sample and the output in different proportions, so that one
                tensor is too few unless a later sample stands for the other; None: those of the step after it.
            unread: whether steps that no later one reads keep their part of the next sample, too: a later step may have
                to take that from its own sample.
        """
        keeps: dict[int, tuple[float, float]] = {}
        scale = np.maximum(np.abs(self.prev).max(1), 1e-300)
        for j in reversed(range(self.n - 1)):
            later = self.prev[j + 1 :, [j, self.n + j]] / scale[j + 1 :, None]
            if np.abs(later).max() <= NEGLIGIBLE:
                if unread:
                    keeps[j] = self._scaled(j, self.prev[j, [j, self.n + j]])
                continue
            # Where all are in one proportion, that of the largest is it.
            direction = later[np.abs(later).max(1).argmax()]
            across = later[:, 0] * direction[1] - later[:, 1] * direction[0]
            if np.abs(across).max() <= 1e-9 * (direction @ direction):
                keeps[j] = self._scaled(j, direction)
            else:
                keeps[j] = keeps.get(j + 1, (0.0, 1.0)) if both is None else both
        return dict(sorted(keeps.items()))

    def _scaled(self, j: int, direction: Array) -> tuple[float, float]:
        """The direction in its simplest length: that of the clean sample, or with 1 as its larger factor."""
        clean = self.clean[j]
        if clean.any():
            across = clean[0] * direction[1] - clean[1] * direction[0]
            if abs(across) <= 1e-9 * np.linalg.norm(clean) * np.linalg.norm(direction):
                return float(clean[0]), float(clean[1])
        if not direction.any():
            return 0.0, 1.0
        direction = direction / direction[np.abs(direction).argmax()]
        direction[np.abs(direction) <= NEGLIGIBLE] = 0
        return float(direction[0]), float(direction[1])

    def _fit(self, keeps: Mapping[int, tuple[float, float]]) -> tuple[Columns, list[list[int]]]:
        """The rows, and for each the steps whose tensors it reads. Raises ValueError where a step has no row."""
        n, inputs = self.n, self.prev.shape[1]
        samples = np.zeros((n + 1, inputs))  # each as a sum of x_0, the outputs and the noise
        samples[0, 0] = 1
        tensors: dict[int, Array] = {}
        found: list[Factors] = []
        rings: list[list[int]] = []
        ring: list[int] = []
        for i in range(n):
            samples[i + 1, n:] = self.prev[i, n:]
            samples[i + 1] += self.prev[i, : i + 1] @ samples[: i + 1]
            factors = self._literal(i, {j: keeps[j] for j in ring})
            # A step that does not read its own sample may have got a copy of it: it reads what that is made of.
            if factors is None or (not factors[0] and factors[3]):
                factors = self._fitted(i, samples, {j: tensors[j] for j in ring})
            found.append(factors)
            rings.append(ring)
            if i in keeps:
                tensors[i] = keeps[i][0] * samples[i]
                tensors[i][n + i] += keeps[i][1]
                ring = [i, *ring][:HISTORY]
        rows = self._columns(*(np.array([factors[k] for factors in found]) for k in (0, 1)))
        rows["s"] = np.array([factors[2] for factors in found])
        reads = [list(factors[3]) for factors in found]
        for i, (_, _, _, history) in enumerate(found):
            for j, factor in history.items():
                rows[f"h{1 + rings[i].index(j)}"][i] = factor
        self._put_given(rows, reads)
        for i, keep in keeps.items():
            if keep == tuple(self.clean[i]):
                rows["k0"][i] = 1
            else:
                rows["k1"][i], rows["k2"][i] = keep
        return rows, reads

    def _literal(self, i: int, ring: Mapping[int, tuple[float, float]]) -> Factors | None:
        """The step's factors where the sampler's code itself adds the tensors of the ring; else None."""
        rest = self.prev[i].copy()
        own = rest[i], rest[self.n + i]
        rest[[i, self.n + i]] = 0
        s, z = 0.0, self.column(i)
        if z is not None:
            s, rest[z] = rest[z], 0
        rest[self.given_columns(i)] = 0
        bound = NEGLIGIBLE * max(np.abs(self.prev[i]).max(), 1e-300) * 10
        history = {}
        for j, (a, b) in ring.items():
            x, m = float(rest[j]), float(rest[self.n + j])
            if max(abs(x), abs(m)) > bound:
                factor = history[j] = (x * a + m * b) / (a * a + b * b)
                rest[[j, self.n + j]] = x - factor * a, m - factor * b
        return None if np.abs(rest).max() > bound else (float(own[0]), float(own[1]), float(s), history)

    def _fitted(self, i: int, samples: Array, ring: Mapping[int, Array]) -> Factors:
        """The step's factors, by least squares, with as few tensors of the ring as will do."""
        target, z = samples[i + 1], self.column(i)
        output = np.eye(1, len(target), self.n + i)[0]
        own = [samples[i], output, *([] if z is None else [np.eye(1, len(target), z)[0]])]
        residual = np.inf
        for count in range(len(ring) + 1):
            for read in itertools.combinations(ring, count):
                columns = np.stack([*own, *(ring[j] for j in read)], 1)
                sizes = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
                factors = np.linalg.lstsq(columns / sizes, target, rcond=1e-13)[0] / sizes
                error = float(relative(np.abs(target - columns @ factors), np.abs(columns) @ np.abs(factors)))
                residual = min(residual, error)
                if error <= LINEAR:
                    x, m, *rest = map(float, factors)
                    s = 0.0 if z is None else rest.pop(0)
                    return x, m, s, dict(zip(read, rest, strict=True))
        raise ValueError(
            f"{at(self, i)}, reads more of the steps before it than the {HISTORY} tensors that rows keep: "
            f"{residual:.1e} of it is left"
        )

    def _columns(self, x: Array, m: Array) -> Columns:
        """All NAMES, those that `columns_of` does not know as zeros."""
        return {name: np.zeros(self.n) for name in NAMES} | columns_of(x, m, self.clean)


def columns_of(x: Array, m: Array, clean: Array) -> Columns:
    """The columns a, b, c0, c1 and c2 of rows with these factors of sample and output, (steps,) each. That of the
    output goes by way of the clean sample, if it can. clean: (steps, 2), a and b."""
    a, b = clean.T.copy()
    c0 = np.divide(m, b, out=np.zeros(len(x)), where=b != 0)
    c1 = x - c0 * a
    by_clean = (b != 0) & ((np.abs(c1) <= 1e3 * np.abs(x)) | (x == 0))
    c1 = np.where(by_clean, np.where(np.abs(c1) <= NEGLIGIBLE * np.abs(x), 0.0, c1), x)
    return {"a": a, "b": b, "c0": np.where(by_clean, c0, 0.0), "c1": c1, "c2": np.where(by_clean, 0.0, m)}
