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
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.tables.trace_run import CLEAN_FIELDS, Step, clip_of, observe, without_clip

__all__ = ["Traced", "follow", "trace_columns"]

Array = npt.NDArray[np.float64]
Clip = tuple[float, float]

BATCH = 48  # random samples
HISTORY = 3  # tensors that a row may read
LINEAR = 1e-10  # the largest relative residual of a step
ROUNDED = 1e-5  # the same where a scheduler computes in float32, whatever it is given
NEGLIGIBLE = 1e-12  # a number below this part of those that it is made of is 0
NAMES = ("a", "b", "c0", "c1", "c2", "s", "h1", "h2", "h3", "k0", "k1", "k2")


class Traced(NamedTuple):
    """A scheduler's steps as rows, and what else is known of them.

    Attributes:
        columns: those of a StepTable: timestep and NAMES, (rows,) each.
        clip: the range that the predicted clean sample is clipped to, or None.
        residual: the largest relative difference between a scheduler's own step and its row.
        steps: what each step did on random numbers.
        noise: the number of the draw that is a step's z, or None where it has none.
        second: whether a x + b m, clipped, is the second tensor that steps return; False where they return none.
    """

    columns: dict[str, Array]
    clip: Clip | None
    residual: float
    steps: list[Step]
    noise: list[int | None]
    second: bool


def trace_columns(scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> dict[str, Array]:
    """The columns of StepTable.trace, whose docstring has the arguments and the errors."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps, **arguments)
    return follow(own, list(own.timesteps), second=CLEAN_FIELDS).columns


def follow(
    scheduler: Any,
    timesteps: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    second: Sequence[str] | None = None,
) -> Traced:
    """The rows of a scheduler's steps at `timesteps`, from the state that it is in.

    Args:
        scheduler: it stays as it is.
        timesteps: what the steps are called with, in order.
        options: further arguments of every step.
        second: the names under which steps may return a x + b m beside the next sample; None: any name.

    Raises:
        ValueError: a step is not linear, or no row can say what it does.
    """
    options = options or {}
    plain = without_clip(scheduler)
    loop = _Loop.run(scheduler, timesteps, options, seed=0)
    linear = _Linear.of(plain, timesteps, options, loop, second)
    clip = None if plain is scheduler or linear.error(loop) is None else clip_of(scheduler)
    if clip is None:
        linear.prove(loop)
        rows = linear.rows()
    else:  # samples that follow from a clipped one are not clipped again
        loop = _Loop.run(scheduler, timesteps, options, seed=0, follows=False)
        rows = _clipped(linear, loop, clip)
    proof = _Loop.run(scheduler, timesteps, options, seed=1, follows=clip is None)
    residual = _prove(rows, clip, linear, proof)
    times = np.array([float(t) for t in timesteps])
    if (times % 1 == 0).all():
        times = times.astype(np.int64)
    columns = {"timestep": times} | {name: np.array([row[name] for row in rows]) for name in NAMES}
    return Traced(columns, clip, residual, loop.steps, linear.noise, linear.second)


Row = dict[str, float]
_Factors = tuple[float, float, float, dict[int, float]]  # of sample, output, noise, and the tensors kept by steps


def _row(**values: float) -> Row:
    return dict.fromkeys(NAMES, 0.0) | values


def _at(linear: _Linear, i: int) -> str:
    return f"step {i}, at timestep {float(linear.timesteps[i]):g}"


# -------------------------------------------------------------------------------------------------- random numbers


class _Loop(NamedTuple):
    """A scheduler's own loop on random numbers: x and m are (steps, batch), the draws of each step (draws, batch)."""

    x: Array
    m: Array
    z: list[Array]
    prev: Array
    second: list[Array | None]
    steps: list[Step]

    @classmethod
    def run(
        cls,
        scheduler: Any,
        timesteps: Sequence[Any],
        options: Mapping[str, Any],
        seed: int,
        *,
        follows: bool = True,
    ) -> _Loop:
        """A loop; where a step's samples are not to follow from the step before, they are random in each."""
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.empty(BATCH, 1, 1, 1, dtype=torch.float64, device="cpu").normal_(generator=generator)

        # Twice as large as a normal distribution, so that predicted clean samples are clipped here and there.
        outputs = [2 * normal() for _ in timesteps]
        inputs: list[Tensor] = []

        def sample(i: int, prev: Tensor | None) -> Tensor:
            inputs.append(prev.double() if follows and prev is not None else 2 * normal())
            return inputs[-1].clone()

        steps = observe(scheduler, timesteps, sample, lambda i: outputs[i].clone(), normal, options)
        z = [np.array([_flat(drawn) for drawn, _ in step.draws]).reshape(-1, BATCH) for step in steps]
        return cls(
            np.array([_flat(x) for x in inputs]),
            np.array([_flat(m) for m in outputs]),
            z,
            np.array([_flat(step.result.prev) for step in steps]),
            [None if step.result.second is None else _flat(step.result.second) for step in steps],
            steps,
        )

    def bound(self) -> float:
        """How far from linear a step may be."""
        wide = all(step.result.prev.dtype == torch.float64 for step in self.steps)
        return LINEAR if wide else ROUNDED


def _flat(x: Tensor) -> Array:
    if x.numel() != len(x):
        raise ValueError(f"a step returns a tensor of shape {tuple(x.shape)} for samples of one number each")
    return x.detach().double().reshape(-1).numpy()


# ----------------------------------------------------------------------------------------------------- unit vectors


class _Linear:
    """Steps as sums of their inputs: the samples x_0 .. x_n-1, the outputs m_0 .. m_n-1, and all noise, in this order.

    Attributes:
        prev: (steps, inputs), the factors of each in the next sample.
        clean: (steps, 2), a and b.
        noise: the number of the draw that is a step's z, or None.
        second: whether each step's second tensor is a x + b m.
    """

    def __init__(self, timesteps: Sequence[Any], prev: Array, clean: Array, noise: list[int | None], first: Array):
        self.timesteps, self.prev, self.clean, self.noise = timesteps, prev, clean, noise
        self.first_draw = first  # of each step, among the inputs
        self.second = False
        self.n = len(timesteps)

    @classmethod
    def of(
        cls,
        scheduler: Any,
        timesteps: Sequence[Any],
        options: Mapping[str, Any],
        loop: _Loop,
        second: Sequence[str] | None,
    ) -> _Linear:
        n = len(timesteps)
        counts = [len(step.draws) for step in loop.steps]
        first = 2 * n + np.concatenate([[0], np.cumsum(counts)]).astype(int)
        inputs = int(first[-1])

        def unit(i: int) -> Tensor:  # the last sample of the batch is all zeros
            x = torch.zeros(inputs + 1, 1, 1, 1, dtype=torch.float64, device="cpu")
            x[i] = 1
            return x

        draws = iter(range(2 * n, inputs))
        steps = observe(
            scheduler, timesteps, lambda i, _: unit(i), lambda i: unit(n + i), lambda: unit(next(draws)), options
        )
        prev = np.array([_flat(step.result.prev) for step in steps])
        clean, is_second = np.zeros((n, 2)), [False] * n
        self = cls(timesteps, prev[:, :-1], clean, [None] * n, first)
        for i, step in enumerate(steps):
            if not np.isfinite(prev[i]).all():
                raise ValueError(f"{_at(self, i)}, is not linear: its result is infinite or no number")
            if abs(prev[i, -1]) > LINEAR:
                raise ValueError(f"{_at(self, i)}, is not linear: it makes {prev[i, -1]:g} of zeros")
            found = step.result.second
            if found is not None and (second is None or step.result.name in second):
                factors = _flat(found)
                own = factors[[i, n + i]]
                if np.abs(np.delete(factors, [i, n + i])).max() <= LINEAR * np.abs(own).max():
                    clean[i], is_second[i] = own, True
            self.noise[i] = self._noise_of(i, counts[i])
        self.second = all(is_second)
        return self

    def _noise_of(self, i: int, draws: int) -> int | None:
        factors = np.abs(self.prev[i, self.first_draw[i] : self.first_draw[i] + draws])
        used = np.flatnonzero(factors > NEGLIGIBLE * np.abs(self.prev[i]).max())
        if len(used) > 1:
            raise ValueError(f"{_at(self, i)}, adds {len(used)} draws of noise, expected at most 1")
        return int(used[0]) if len(used) else None

    def column(self, i: int) -> int | None:
        """The input that is step i's z."""
        draw = self.noise[i]
        return None if draw is None else int(self.first_draw[i]) + draw

    def prove(self, loop: _Loop) -> None:
        """Raises ValueError where a step on random numbers is not the sum that it was on unit vectors."""
        error = self.error(loop)
        if error is not None:
            raise error

    def error(self, loop: _Loop) -> ValueError | None:
        """What `prove` raises."""
        inputs = np.concatenate([loop.x, loop.m, *loop.z])
        for i in range(self.n):
            parts = np.abs(self.prev[i]) @ np.abs(inputs)
            error = np.abs(loop.prev[i] - self.prev[i] @ inputs)
            worst = _relative(error, parts)
            if not worst <= loop.bound():
                return ValueError(f"{_at(self, i)}, is not linear: random numbers differ by {worst:.1e}, relatively")
        return None

    # ------------------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[Row]:
        """The row of each step. Raises ValueError where a step needs more than rows can keep."""
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
            if factors is None:
                factors = self._fitted(i, samples, {j: tensors[j] for j in ring})
            row = self._split(i, factors[0], factors[1], keeps.get(i))
            row |= {"s": factors[2]} | {f"h{1 + ring.index(j)}": factor for j, factor in factors[3].items()}
            rows.append((row, list(factors[3])))
            if i in keeps:
                tensors[i] = keeps[i][0] * samples[i]
                tensors[i][n + i] += keeps[i][1]
                ring = [i, *ring][:HISTORY]
        return rows

    def _literal(self, i: int, ring: Mapping[int, tuple[float, float]]) -> _Factors | None:
        """The step's factors where the scheduler's code itself adds the tensors of the ring; else None."""
        rest = self.prev[i].copy()
        own = rest[i], rest[self.n + i]
        rest[[i, self.n + i]] = 0
        s, z = 0.0, self.column(i)
        if z is not None:
            s, rest[z] = rest[z], 0
        bound = NEGLIGIBLE * max(np.abs(self.prev[i]).max(), 1e-300) * 10
        history = {}
        for j, keep in ring.items():
            at, direction = [j, self.n + j], np.array(keep)
            factor = rest[at] @ direction / (direction @ direction)
            if np.abs(rest[at]).max() > bound:
                history[j] = float(factor)
                rest[at] -= factor * direction
        return None if np.abs(rest).max() > bound else (float(own[0]), float(own[1]), float(s), history)

    def _fitted(self, i: int, samples: Array, ring: Mapping[int, Array]) -> _Factors:
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
                error = _relative(np.abs(target - columns @ factors), np.abs(columns) @ np.abs(factors))
                residual = min(residual, error)
                if error <= LINEAR:
                    x, m, *rest = map(float, factors)
                    s = 0.0 if z is None else rest.pop(0)
                    return x, m, s, dict(zip(read, rest, strict=True))
        raise ValueError(
            f"{_at(self, i)}, reads more of the steps before it than the {HISTORY} tensors that rows keep: "
            f"{residual:.1e} of it is left"
        )

    def _split(self, i: int, x: float, m: float, keep: tuple[float, float] | None) -> Row:
        """A row of the factors of sample and output; that of the output goes by way of the clean sample, if it can."""
        a, b = map(float, self.clean[i])
        row = _row(a=a, b=b, c1=x, c2=m)
        if b:
            c0 = m / b
            c1 = x - c0 * a
            if abs(c1) <= 1e3 * abs(x) or x == 0:
                row |= {"c0": c0, "c1": 0.0 if abs(c1) <= NEGLIGIBLE * abs(x) else c1, "c2": 0.0}
        if keep is not None:
            row |= {"k0": 1.0} if keep == (a, b) else {"k1": keep[0], "k2": keep[1]}
        return row


# ------------------------------------------------------------------------------------------------------------ clips


def _clipped(linear: _Linear, loop: _Loop, clip: Clip) -> list[Row]:
    """The rows of steps that clip the predicted clean sample and have no history.

    linear: without the clip. loop: with it, on numbers that are clipped here and there. There the clipped clean sample
    does not follow from sample and output, so that the factors of all three are found.
    """
    rows = []
    for i in range(linear.n):
        n, column = linear.n, linear.column(i)
        own = [i, n + i, *([] if column is None else [column])]
        if np.abs(np.delete(linear.prev[i], own)).max(initial=0) > LINEAR * np.abs(linear.prev[i]).max():
            raise ValueError(f"{_at(linear, i)}, reads earlier steps, and the clean sample is clipped")
        draw = linear.noise[i]
        z = np.zeros(BATCH) if draw is None else loop.z[i][draw]
        s = 0.0 if column is None else float(linear.prev[i, column])
        a, b = linear.clean[i] if linear.second else linear.prev[i, own[:2]]
        x0 = np.clip(a * loop.x[i] + b * loop.m[i], *clip)
        target = loop.prev[i] - s * z
        for names in (("c0",), ("c0", "c1"), ("c0", "c2"), ("c0", "c1", "c2")):
            columns = np.stack([{"c0": x0, "c1": loop.x[i], "c2": loop.m[i]}[name] for name in names], 1)
            factors = np.linalg.lstsq(columns, target, rcond=1e-13)[0]
            error = _relative(np.abs(target - columns @ factors), np.abs(columns) @ np.abs(factors))
            if error <= loop.bound():
                break
        else:
            raise ValueError(f"{_at(linear, i)}, is not linear after the clip: {error:.1e} of it is left")
        rows.append(_row(a=float(a), b=float(b), s=s, **dict(zip(names, map(float, factors), strict=True))))
    return rows


# ------------------------------------------------------------------------------------------------------------ proof


def _prove(rows: Sequence[Row], clip: Clip | None, linear: _Linear, loop: _Loop) -> float:
    """The largest residual of the rows in a loop. Raises ValueError where one is too large."""
    largest, ring = 0.0, [np.zeros(BATCH)] * HISTORY
    for i, row in enumerate(rows):
        x, m, draw = loop.x[i], loop.m[i], linear.noise[i]
        z = np.zeros(BATCH) if draw is None else loop.z[i][draw]
        x0 = row["a"] * x + row["b"] * m
        if clip is not None:
            x0 = np.clip(x0, *clip)
        factors = [row[name] for name in ("c0", "c1", "c2", "s", "h1", "h2", "h3")]
        terms = np.array(factors)[:, None] * np.array([x0, x, m, z, *ring])
        errors = [_relative(np.abs(loop.prev[i] - terms.sum(0)), np.abs(terms).sum(0))]
        second = loop.second[i]
        if linear.second and second is not None:
            parts = np.abs(row["a"] * x) + np.abs(row["b"] * m)
            errors.append(_relative(np.abs(second - x0), parts))
        if not max(errors) <= loop.bound():
            raise ValueError(f"{_at(linear, i)}, is not linear: random numbers differ by {max(errors):.1e}, relatively")
        largest = max(largest, *errors)
        if row["k0"] or row["k1"] or row["k2"]:
            ring = [row["k0"] * x0 + row["k1"] * x + row["k2"] * m, *ring][:HISTORY]
    return largest


def _relative(error: Array, parts: Array) -> float:
    """The largest error, relative to the sum of its parts' sizes. A NaN counts as infinite."""
    size = max(float(parts.max()), 1e-300)
    worst = float(error.max()) / size
    return worst if np.isfinite(worst) else float("inf")
