"""The numbers on which a sampler's own loop runs twice.

The first run finds the rows: samples are single numbers, most of them unit vectors, the others random, for what unit
vectors do not show. The second run proves the rows: two samples of several channels and pixels, whose numbers are all
random, of other sizes and signs in each step. A step that reads a whole tensor, such as its standard deviation or the
sign of its mean, or that tells pixels apart, does something else there than in the first run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.tables.trace_run import OtherResults, Run, Step, Taken

Array = npt.NDArray[np.float64]

SLOTS = 8  # of unit vectors: how many steps a step may read, with itself
DRAWS = 16  # draws of noise in a step for which there are unit vectors
RANDOM = 32  # random samples of a kind
LINEAR = 1e-10  # the largest relative residual of a step
ROUNDED = 1e-5  # the same where a sampler computes in float32, whatever it is given
UNIT = 2.0**-20  # the length of unit vectors: so short that no clip touches them, and exact to divide by
EXACT = 1e-12  # how far the model's input may be from a factor times the sample, relatively


class Numbers(NamedTuple):
    """A loop on random numbers: x, m and prev are (steps, batch), z (steps, draws, batch).

    wide: whether its results are float64.
    scaled: what scale_model_input made of the sample of each step but the first, None where it was not another tensor.
    """

    x: Array
    m: Array
    z: Array
    prev: Array
    second: list[Array | None]
    wide: bool
    scaled: list[Array | None]

    def bound(self) -> float:
        """How far from linear a step may be."""
        return LINEAR if self.wide else ROUNDED

    def part(self, part: slice) -> Numbers:
        x, m, z, prev = (each[..., part] for each in self[:4])
        second, scaled = ([None if x is None else x[part] for x in each] for each in (self.second, self.scaled))
        return Numbers(x, m, z, prev, second, self.wide, scaled)


class Trial(NamedTuple):
    """A loop on one batch: unit vectors, a zero, and random samples.

    Attributes:
        steps: what each did.
        prev: (steps, SLOTS, 2 + DRAWS), what of the sample, the output and the draws of this step, of the one before
            and so on is in the next sample. A slot of unit vectors is taken again after SLOTS steps: where steps read
            further back, that is no sum of these.
        zeros: (steps,), what each makes of zeros.
        second: the same as `prev` for the second tensor, where a step returns one.
        loose: short random samples that do not follow from each other.
        follows: short random samples, each made of the one before by the loop's own steps.
        clipped: long ones that do not follow from each other, in a loop that may clip.
        scales: (steps,), what each step's sample is multiplied by for the model, 1 for the first; None where it is not
            multiplied, or something else is done to it.
    """

    steps: list[Step]
    prev: Array
    zeros: Array
    second: list[Array | None]
    loose: Numbers
    follows: Numbers
    clipped: Numbers | None
    scales: Array | None

    @classmethod
    def of(cls, run: Run) -> Trial:
        n, kinds = len(run.times), 2 + DRAWS + run.given
        zero = SLOTS * kinds
        parts = [slice(zero + 1 + k * RANDOM, zero + 1 + (k + 1) * RANDOM) for k in range(3 if run.clips else 2)]
        lengths = np.full((kinds, parts[-1].stop - zero - 1), UNIT)
        # Twice as large as a clip's range, so that predicted clean samples are clipped here and there.
        lengths[:2, 2 * RANDOM :], lengths[2:, 2 * RANDOM :] = 2 * max(1.0, run.clip), 1.0
        shape = parts[-1].stop, *[1] * (run.dims - 1)
        generator, steps = np.random.default_rng(0), np.arange(n)

        def inputs(kind: int) -> Array:
            made = np.zeros((n, shape[0]))
            made[steps, kind * SLOTS + steps % SLOTS] = UNIT
            made[:, zero + 1 :] = signed(lengths[kind] * generator.standard_normal((n, shape[0] - zero - 1)), 1)
            return made

        loop, taken = _loop(run, shape, inputs, parts[1])
        places = (steps[:, None] - np.arange(SLOTS)) % SLOTS

        def read(found: Array, places: Any) -> Array:
            units = found[:, :zero].reshape(len(found), kinds, SLOTS)
            return units[np.arange(len(found))[:, None], :, places] / UNIT

        return cls(
            [each.step for each in taken],
            read(loop.prev, places),
            loop.prev[:, zero],
            [None if found is None else read(found[None], places[k : k + 1])[0] for k, found in enumerate(loop.second)],
            loop.part(parts[0]),
            loop.part(parts[1]),
            loop.part(parts[2]) if run.clips else None,
            _scales(loop),
        )


PROVING = 2, 3, 4, 5, *[2] * 8  # the shape of samples by which rows are proven, as far as these have dimensions
SIZES = 16.0, 1.0, 4.0  # of their numbers in each step, by turns
TAILS = 1.0, 1.0, 1.0, 1.0, 4.0  # and in each place, by turns, for a step that clamps what is far from the mean


def proof_of(run: Run, a: Array, b: Array) -> list[Numbers]:
    """The second run: samples that follow from each other, and, where a loop may clip, others that do not.

    a, b: (steps,), of the predicted clean sample a x + b m. Of samples that do not follow, this is about as large as
    the clip's range, and not mostly beyond it, as that of random samples is at a high level of noise.
    """
    shape = PROVING[: run.dims]
    n, count, generator = len(run.times), int(np.prod(shape)), np.random.default_rng(1)
    follows = slice(0, count // 2 if run.clips else count)
    sizes, clip = np.resize(SIZES, (n, 1)) * np.resize(TAILS, count), 2 * max(1.0, run.clip)

    def inputs(kind: int) -> Array:
        return signed(sizes * (clip if kind < 2 else 1.0) * generator.standard_normal((n, count)), -1)

    x, m, rest = inputs(0), inputs(1), slice(follows.stop, None)
    if run.clips:
        x0, a, b = clip * generator.standard_normal((n, count - follows.stop)), a[:, None], b[:, None]
        by_sample = np.abs(a) > 1e-3 * np.abs(b)
        x[:, rest] = np.where(by_sample, (x0 - b * m[:, rest]) / np.where(by_sample, a, 1), x[:, rest])
        m[:, rest] = np.where(by_sample | (b == 0), m[:, rest], (x0 - a * x[:, rest]) / np.where(b == 0, 1, b))
    loop, _ = _loop(run, shape, lambda kind: (x, m)[kind] if kind < 2 else inputs(kind), follows, notes=False)
    return [loop.part(follows), loop.part(rest)] if run.clips else [loop]


def signed(numbers: Array, sign: int) -> Array:
    """Numbers (steps, batch) times 1 or -1 in each step, so that their sum has this sign."""
    found: Array = numbers * np.where(numbers.sum(1, keepdims=True) * sign < 0, -1, 1)
    return found


def _loop(
    run: Run, shape: tuple[int, ...], inputs: Callable[[int], Array], follows: slice, **options: bool
) -> tuple[Numbers, list[Taken]]:
    """A run of a loop. inputs(kind): (steps, batch), of samples (0), outputs (1), or the draws of each step (2 ...).
    follows: those of a sample that are what the step before made. options: of run.observe."""
    kinds: list[Array] = []
    flats: list[Tensor] = []
    own: list[Any] = []  # the loop's own copies, of which it gets one after the other
    drawn: list[int] = []

    def given(kind: int, i: int) -> Tensor:
        if kind == len(kinds):
            kinds.append(inputs(kind))
            flats.append(torch.from_numpy(kinds[-1].copy()))
            own.append(flats[-1].view(-1, *shape).unbind())
        return own[kind][i]

    def sample(i: int, before: Tensor | None) -> Tensor:
        drawn.append(0)
        x: Tensor = own[0][i]
        if before is not None:
            check_shape(before, shape)
            following[i].copy_(before.reshape(-1)[follows])
        return x

    def noise() -> Tensor:
        if drawn[-1] == DRAWS + run.given:
            raise ValueError(f"a step draws more than {DRAWS} tensors of noise")
        drawn[-1] += 1
        return given(1 + drawn[-1], len(drawn) - 1)

    given(0, 0), given(1, 0)
    following = flats[0][:, follows].unbind()
    try:
        taken = run.observe(sample, own[1].__getitem__, noise, **options)
    except OtherResults:
        return _loop(run, shape, inputs, follows, tuples=False, **options)
    check_shape(taken[-1].prev, shape)
    prev = torch.stack([each.prev for each in taken]).double().numpy().reshape(len(taken), -1)
    kinds[0][1:, follows] = prev[:-1, follows]
    z = np.stack(kinds[2:], 1) if kinds[2:] else np.zeros((*kinds[0].shape[:1], 0, kinds[0].shape[1]))
    for draw in range(z.shape[1]):
        z[np.array(drawn) <= draw, draw] = 0
    second = [None if each.second is None else flat(each.second, shape) for each in taken]
    wide = all(each.prev.dtype == torch.float64 for each in taken)
    scaled = [None if each.scaled is None else flat(each.scaled, each.scaled.shape) for each in taken[1:]]
    return Numbers(kinds[0], kinds[1], z, prev, second, wide, scaled), taken


def _scales(loop: Numbers) -> Array | None:
    """Trial.scales."""
    scaled = [x for x in loop.scaled if x is not None]
    if not scaled or len(scaled) < len(loop.scaled):
        return None
    steps = np.arange(len(loop.x))
    factors: Array = np.stack([loop.x[0], *scaled])[steps, steps % SLOTS] / UNIT
    return factors if is_scaled(loop, factors) else None


def is_scaled(loop: Numbers, factors: Array) -> bool:
    """Whether samples were multiplied by these factors for the model."""
    with np.errstate(invalid="ignore"):  # a factor may be infinite
        made = factors[1:, None] * loop.x[1:]
        return all(
            found is not None and found.shape == x.shape and bool((np.abs(found - x) <= EXACT * np.abs(x)).all())
            for found, x in zip(loop.scaled, made, strict=True)
        )


def flat(x: Tensor, shape: tuple[int, ...]) -> Array:
    check_shape(x, shape)
    return x.double().numpy(force=True).reshape(-1)


def check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"a step returns a tensor of shape {tuple(x.shape)} for samples of shape {shape}")


def relative(error: Array, parts: Array) -> Array:
    """The largest error of each row, relative to the sum of its parts' sizes. A NaN counts as infinite."""
    worst = error.max(-1) / np.maximum(parts.max(-1), 1e-300)
    return np.where(np.isfinite(worst), worst, np.inf)
