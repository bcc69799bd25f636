"""The batch on which a sampler's own loop runs once: unit vectors, from which its rows are read, beside random numbers,
by which they are proven."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.tables.trace_run import OtherResults, Run, Step

Array = npt.NDArray[np.float64]

RANDOM = 48  # random samples of a kind
LINEAR = 1e-10  # the largest relative residual of a step
ROUNDED = 1e-5  # the same where a sampler computes in float32, whatever it is given
UNIT = 2.0**-20  # the length of unit vectors: so short that no clip touches them, and exact to divide by
EXACT = 1e-12  # how far the model's input may be from a factor times the sample, relatively
DRAWS = 1, 4, 16  # draws of noise in a step for which there are unit vectors, tried in turn


class TooManyDraws(Exception):
    """A loop draws more noise than there are unit vectors for."""


class Numbers(NamedTuple):
    """A loop on random numbers: x, m and prev are (steps, batch), the draws of each step (draws, batch).

    wide: whether its results are float64.
    """

    x: Array
    m: Array
    z: list[Array]
    prev: Array
    second: list[Array | None]
    wide: bool

    def bound(self) -> float:
        """How far from linear a step may be."""
        return LINEAR if self.wide else ROUNDED


class Trial(NamedTuple):
    """A loop on one batch: unit vectors, zeros, and random samples.

    Attributes:
        steps: what each did.
        prev: (steps, inputs), what of each unit vector is in the next sample. The inputs are the samples x_0 .. x_n-1,
            the outputs m_0 .. m_n-1, and all noise, in this order.
        zeros: (steps,), what each makes of zeros.
        second: the same as `prev` for the second tensor, where a step returns one.
        follows: random samples, each made of the one before by the loop's own steps.
        loose: two loops of random samples that do not follow from each other, in a loop that may clip.
        scales: (steps,), what each step's sample is multiplied by for the model, 1 for the first; None where it is not
            multiplied, or something else is done to it.
    """

    steps: list[Step]
    prev: Array
    zeros: Array
    second: list[Array | None]
    follows: Numbers
    loose: tuple[Numbers, ...]
    scales: Array | None

    @classmethod
    def of(cls, run: Run) -> Trial:
        """The loop, which is run again where it draws more noise than the first batch has unit vectors for, or where
        its steps have to return objects."""
        draws = iter(DRAWS)
        most = next(draws)
        while True:
            try:
                return cls._of(run, most + run.given)
            except TooManyDraws:
                most = next(draws, 0)
                if not most:
                    raise ValueError(f"a step draws more than {DRAWS[-1]} tensors of noise") from None
            except OtherResults:
                observe: Any = run.observe
                run = run._replace(observe=partial(observe, tuples=False))

    @classmethod
    def _of(cls, run: Run, most_draws: int) -> Trial:
        n = len(run.times)
        zeros = (2 + most_draws) * n
        parts = [slice(zeros + 1 + k * RANDOM, zeros + 1 + (k + 1) * RANDOM) for k in range(3 if run.clips else 1)]
        following, random = parts[0], slice(zeros + 1, parts[-1].stop)
        generator = np.random.default_rng(0)
        # Twice as large as a clip's range, so that predicted clean samples are clipped here and there.
        size = 2 * max(1.0, run.clip)

        def inputs(count: int, first: int, scale: float) -> Array:
            made = np.zeros((count, random.stop))
            made[:, first : first + count].flat[:: count + 1] = UNIT
            made[:, random] = scale * generator.standard_normal((count, random.stop - random.start))
            return made

        x, m, z = inputs(n, 0, size), inputs(n, n, size), inputs(most_draws * n, 2 * n, 1.0)
        shape = random.stop, *[1] * (run.dims - 1)
        # The loop's own copies, of which it gets one after the other.
        own = x.copy()
        xs, ms, zs = (torch.from_numpy(each).reshape(-1, *shape).unbind() for each in (own, m.copy(), z.copy()))
        drawn, prev, left = iter(zs), [], most_draws

        def sample(i: int, before: Tensor | None) -> Tensor:
            nonlocal left
            left = most_draws
            if before is not None:
                prev.append(flat(before))
                own[i, following] = x[i, following] = prev[-1][following]
            return xs[i]

        def noise() -> Tensor:
            nonlocal left
            left -= 1
            found = next(drawn, None) if left >= 0 else None
            if found is None:  # in the first step that draws more, before all others are run in vain
                raise TooManyDraws
            return found

        taken = run.observe(sample, ms.__getitem__, noise)
        steps = [each.step for each in taken]
        prev.append(flat(taken[-1].prev))
        results = np.stack(prev)
        second = [None if each.second is None else flat(each.second) for each in taken]
        ends = np.cumsum([0, *(len(step.draws) for step in steps)])
        wide = all(each.prev.dtype == torch.float64 for each in taken)

        def numbers(part: slice) -> Numbers:
            draws = [z[begin:end, part] for begin, end in pairwise(ends)]
            cut = [None if found is None else found[part] for found in second]
            return Numbers(x[:, part], m[:, part], draws, results[:, part], cut, wide)

        count = 2 * n + int(ends[-1])
        return cls(
            steps,
            results[:, :count] / UNIT,
            results[:, zeros],
            [None if found is None else found[:count] / UNIT for found in second],
            numbers(parts[0]),
            tuple(map(numbers, parts[1:])),
            _scales(x, [each.scaled for each in taken]),
        )


def _scales(x: Array, scaled: list[Any]) -> Array | None:
    """Trial.scales, of samples (steps, batch) and what was made of each."""
    if len(scaled) == 1 or not all(isinstance(each, Tensor) and each.dtype == torch.float64 for each in scaled[1:]):
        return None
    results = np.stack([x[0], *map(flat, scaled[1:])])
    steps = np.arange(len(x))
    factors = results[steps, steps] / UNIT
    with np.errstate(invalid="ignore"):  # a factor may be infinite
        made = factors[:, None] * x
        return factors if (np.abs(results - made) <= EXACT * np.abs(made)).all() else None


def flat(x: Tensor) -> Array:
    if x.dim() == 0 or x.numel() != x.shape[0]:
        raise ValueError(f"a step returns a tensor of shape {tuple(x.shape)} for samples of one number each")
    return x.double().numpy(force=True).reshape(-1)


def relative(error: Array, parts: Array) -> Array:
    """The largest error of each row, relative to the sum of its parts' sizes. A NaN counts as infinite."""
    worst = error.max(-1) / np.maximum(parts.max(-1), 1e-300)
    return np.where(np.isfinite(worst), worst, np.inf)
