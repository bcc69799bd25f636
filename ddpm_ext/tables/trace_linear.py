"""The rows of a sampler's steps, from what it makes of unit vectors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.tables.trace_random import LINEAR, Array, RandomRun, flat, relative
from ddpm_ext.tables.trace_run import Run

HISTORY = 3  # tensors that a row may read
NEGLIGIBLE = 1e-12  # a number below this part of those that it is made of is 0
NAMES = ("a", "b", "c0", "c1", "c2", "s", "h1", "h2", "h3", "k0", "k1", "k2")

Row = dict[str, float]
Factors = tuple[float, float, float, dict[int, float]]  # of sample, output, noise, and the tensors kept by steps


def row_of(**values: float) -> Row:
    return dict.fromkeys(NAMES, 0.0) | values


def at(linear: Linear, i: int) -> str:
    return f"step {i}, at {linear.run.unit} {float(linear.run.times[i]):g}"


class Linear:
    """Steps as sums of their inputs: the samples x_0 .. x_n-1, the outputs m_0 .. m_n-1, and all noise, in this order.

    Attributes:
        prev: (steps, inputs), the factors of each in the next sample.
        clean: (steps, 2), a and b.
        noise: the number of the draw that is a step's z, or None.
        given: the numbers of the draws that a step reads beside that: tensors that it was given.
        second: whether each step's second tensor is a x + b m.
    """

    def __init__(self, run: Run, loop: RandomRun, second: Sequence[str] | None) -> None:
        """loop: any of the same run. second: as for `follow`."""
        self.run, n = run, len(run.times)
        self.n = n
        counts = [len(step.draws) for step in loop.steps]
        self.first_draw = 2 * n + np.concatenate([[0], np.cumsum(counts)]).astype(int)  # of each step, among the inputs
        inputs = int(self.first_draw[-1])
        ones = loop.steps[0].result.prev.shape[1:]

        def unit(i: int) -> Tensor:  # the last sample of the batch is all zeros
            x = torch.zeros(inputs + 1, *ones, dtype=torch.float64, device="cpu")
            x[i] = 1
            return x

        draws = iter(range(2 * n, inputs))
        steps = run.observe(lambda i, _: unit(i), lambda i: unit(n + i), lambda: unit(next(draws)))
        prev = np.array([flat(step.result.prev) for step in steps])
        self.prev, self.clean, is_second = prev[:, :-1], np.zeros((n, 2)), [False] * n
        self.noise: list[int | None] = []
        self.given: list[list[int]] = []
        for i, step in enumerate(steps):
            if not np.isfinite(prev[i]).all():
                raise ValueError(f"{at(self, i)}, is not linear: its result is infinite or no number")
            if abs(prev[i, -1]) > LINEAR:
                raise ValueError(f"{at(self, i)}, is not linear: it makes {prev[i, -1]:g} of zeros")
            found = step.result.second
            if found is not None and (second is None or step.result.name in second):
                factors = flat(found)
                own = factors[[i, n + i]]
                if np.abs(np.delete(factors, [i, n + i])).max() <= LINEAR * np.abs(own).max():
                    self.clean[i], is_second[i] = own, True
            z, given = self._draws_of(i, counts[i], step.given)
            self.noise.append(z)
            self.given.append(given)
        self.second = all(is_second)

    def _draws_of(self, i: int, draws: int, given: int) -> tuple[int | None, list[int]]:
        """The draw that is a step's z, and the others that it reads, all among the first `given`."""
        factors = np.abs(self.prev[i, self.first_draw[i] : self.first_draw[i] + draws])
        used = [int(draw) for draw in np.flatnonzero(factors > NEGLIGIBLE * np.abs(self.prev[i]).max())]
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

    def has_history(self) -> bool:
        """Whether any step reads what earlier ones were called with."""
        for i, prev in enumerate(self.prev):
            z = self.column(i)
            own = [i, self.n + i, *([] if z is None else [z]), *self.given_columns(i)]
            if np.abs(np.delete(prev, own)).max(initial=0) > LINEAR * np.abs(prev).max():
                return True
        return False

    def prove(self, loop: RandomRun) -> None:
        """Raises ValueError where a step on random numbers is not the sum that it was on unit vectors."""
        inputs = np.concatenate([loop.x, loop.m, *loop.z])
        for i in range(self.n):
            parts = np.abs(self.prev[i]) @ np.abs(inputs)
            error = np.abs(loop.prev[i] - self.prev[i] @ inputs)
            worst = relative(error, parts)
            if not worst <= loop.bound():
                raise ValueError(f"{at(self, i)}, is not linear: random numbers differ by {worst:.1e}, relatively")

    # ------------------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[Row]:
        """The row of each step. Raises ValueError where a step needs more than rows can keep."""
        try:
            return self._rows()
        except ValueError as error:
            other = copy.copy(self)
            other.prev = self._without_past_noise()
            try:
                return other._rows()  # noqa: SLF001 (of this module)
            except ValueError:
                raise error from None

    def _without_past_noise(self) -> Array:
        """`prev`, where the noise of an earlier step is written as the next step's sample less all else in it."""
        prev = self.prev.copy()
        for i in range(self.n):
            for j in reversed(range(i)):
                z = self.column(j)
                if z is not None and prev[i, z]:
                    factor = prev[i, z] / self.prev[j, z]
                    prev[i] -= factor * self.prev[j]
                    prev[i, j + 1] += factor
        return prev

    def _rows(self) -> list[Row]:
        error: ValueError | None = None
        for unread, both in itertools.product((False, True), (None, (0.0, 1.0), (1.0, 0.0))):
            keeps = self._kept(both, unread)
            try:
                rows = self._fit(keeps)
                used = {j for _, read in rows for j in read}
                if used < keeps.keys():  # what no row reads need not be kept
                    rows = self._fit({j: keep for j, keep in keeps.items() if j in used})
                return [row for row, _ in rows]
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
            _, sizes, directions = np.linalg.svd(later, full_matrices=False)
            if len(sizes) == 1 or sizes[1] <= 1e-9 * sizes[0]:
                keeps[j] = self._scaled(j, directions[0])
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

    def _fit(self, keeps: Mapping[int, tuple[float, float]]) -> list[tuple[Row, list[int]]]:
        """The rows, and for each the steps whose tensors it reads. Raises ValueError where a step has no row."""
        n, inputs = self.n, self.prev.shape[1]
        samples = np.zeros((n + 1, inputs))  # each as a sum of x_0, the outputs and the noise
        samples[0, 0] = 1
        tensors: dict[int, Array] = {}
        rows = []
        ring: list[int] = []
        for i in range(n):
            samples[i + 1, n:] = self.prev[i, n:]
            samples[i + 1] += self.prev[i, : i + 1] @ samples[: i + 1]
            factors = self._literal(i, {j: keeps[j] for j in ring})
            # A step that does not read its own sample may have got a copy of it: it reads what that is made of.
            if factors is None or (not factors[0] and factors[3]):
                factors = self._fitted(i, samples, {j: tensors[j] for j in ring})
            row = self._split(i, factors[0], factors[1], keeps.get(i))
            row |= {"s": factors[2]} | {f"h{1 + ring.index(j)}": factor for j, factor in factors[3].items()}
            given = self.given_columns(i)
            if len(given) > HISTORY or (given and factors[3]):
                raise ValueError(f"{at(self, i)}, reads {len(given)} given tensors beside those of earlier steps")
            row |= {f"h{1 + k}": float(self.prev[i, column]) for k, column in enumerate(given)}
            rows.append((row, list(factors[3])))
            if i in keeps:
                tensors[i] = keeps[i][0] * samples[i]
                tensors[i][n + i] += keeps[i][1]
                ring = [i, *ring][:HISTORY]
        return rows

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
        for j, keep in ring.items():
            at, direction = [j, self.n + j], np.array(keep)
            factor = rest[at] @ direction / (direction @ direction)
            if np.abs(rest[at]).max() > bound:
                history[j] = float(factor)
                rest[at] -= factor * direction
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
                error = relative(np.abs(target - columns @ factors), np.abs(columns) @ np.abs(factors))
                residual = min(residual, error)
                if error <= LINEAR:
                    x, m, *rest = map(float, factors)
                    s = 0.0 if z is None else rest.pop(0)
                    return x, m, s, dict(zip(read, rest, strict=True))
        raise ValueError(
            f"{at(self, i)}, reads more of the steps before it than the {HISTORY} tensors that rows keep: "
            f"{residual:.1e} of it is left"
        )

    def _split(self, i: int, x: float, m: float, keep: tuple[float, float] | None) -> Row:
        """A row of the factors of sample and output; that of the output goes by way of the clean sample, if it can."""
        a, b = map(float, self.clean[i])
        row = row_of(a=a, b=b, c1=x, c2=m)
        if b:
            c0 = m / b
            c1 = x - c0 * a
            if abs(c1) <= 1e3 * abs(x) or x == 0:
                row |= {"c0": c0, "c1": 0.0 if abs(c1) <= NEGLIGIBLE * abs(x) else c1, "c2": 0.0}
        if keep is not None:
            row |= {"k0": 1.0} if keep == (a, b) else {"k1": keep[0], "k2": keep[1]}
        return row
