"""What the steps of a scheduler in closed form are, and the factors that several classes have in common; see
closed_rows.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.tables.trace_batch import Array

WIDE = np.float64


class Uncovered(Exception):
    """An expression is not what a scheduler's steps do."""


class Untraceable(Exception):
    """Why a scheduler's steps are no rows, so that nobody traces them in vain."""


class Clipped(NamedTuple):
    """A clean sample that steps clip, and add times a factor.

    Attributes:
        clean: (steps, 2), a and b of a sample + b output.
        clip: the range that this is clipped to.
        factor: (steps,).
    """

    clean: Array
    clip: tuple[float, float]
    factor: Array


class Factors(NamedTuple):
    """Of steps prev = x * sample + m * output + s * noise, float64 (steps,) each.

    Attributes:
        clean: (steps, 2), a and b of the second tensor, a sample + b output, that a step returns; None without one.
        draws: (steps,), how often a step draws noise, of which it adds the last.
        scales: what each step's sample is multiplied by for the model, 1 for the first; None where it is not.
        past: (steps, tensors, 2), the factors of the sample and the output of each of the last steps that stored a
            tensor, the last one first, which a step adds as well; None where the scheduler stores no tensor.
        skips: a step that stores none, though others do; None without one.
        own: (steps,), as TraceResult has it; None for zeros.
        period: with 2, every second step stores a tensor, which the one after it reads and drops.
        dt: (steps,), the length that every `period`th step stores; None where none does.
        is_one: (steps,), as Step has it; None where all have two tensors, or one.
        given: (steps,), the factor of a tensor that a step is given; None where it is given none.
        clipped: what is clipped, which is the second tensor as well where there is one; None for nothing.
    """

    x: Array
    m: Array
    s: Array
    clean: Array | None
    draws: Sequence[int]
    scales: Array | None = None
    past: Array | None = None
    skips: int | None = None
    own: list[float] | None = None
    period: int = 1
    dt: Tensor | None = None
    is_one: list[bool] | None = None
    given: Array | None = None
    clipped: Clipped | None = None


class Form(NamedTuple):
    """A class's expression.

    Attributes:
        factors: of an object and the place of a loop's first timestep.
        settings: of the config, on which it hangs what the expression is. Some of its classes may not have one.
        reads: the attributes that it and the class's own steps read before they write them.
        counter: the one that counts the steps; None without one.
        alike: whether all steps are the same expression of their levels, whatever their number, without noise and
            without what other steps left.
        is_of_intervals: whether the last timestep is the end of the last step, and timesteps have a dimension.
    """

    factors: Callable[[Any, int], Factors]
    settings: tuple[str, ...]
    reads: frozenset[str]
    counter: str | None = "_step_index"
    alike: bool = False
    is_of_intervals: bool = False


# Levels and products of levels are float32, as diffusers computes them, and what a step makes of a sample float64. So
# the rows have the bits of traced ones.


def levels_of(x: Tensor) -> Array:
    if x.dtype is not torch.float32:
        raise Uncovered
    found: Array = x.numpy()
    return found


def root_of(x: Array) -> Array:
    """By torch, as diffusers' own: numpy's last bit may be another."""
    return torch.from_numpy(x).sqrt().numpy()


def clean_of(own: Any, sigma: Array) -> tuple[Array, Array]:
    """The factors of sample and output in the clean sample, (steps, 2), and what a sample is divided by for the
    model."""
    one, root = np.ones(len(sigma)), root_of(sigma**2 + 1)
    a, b = {
        "epsilon": lambda: (one, -sigma),
        "v_prediction": lambda: (1 / (sigma**2 + 1).astype(WIDE), -sigma / root),
        "sample": lambda: (0 * one, one),
    }[getattr(own.config, "prediction_type", "epsilon")]()
    return np.stack([a, b], 1), root


def predicted_of(own: Any, alpha: Array) -> tuple[Array, Array]:
    """The factors of sample and output in the clean sample and in the noise, (steps, 2) each. alpha: cumulative."""
    signal, noise = root_of(alpha).astype(WIDE), root_of(1 - alpha).astype(WIDE)
    zero, one = 0 * signal, 0 * signal + 1
    of_each = {
        "epsilon": lambda: (1 / signal, -noise / signal, zero, one),
        "v_prediction": lambda: (signal, -noise, noise, signal),
        "sample": lambda: (zero, one, 1 / noise, -signal / noise),
    }[own.config.prediction_type]()
    return np.stack(of_each[:2], 1), np.stack(of_each[2:], 1)


def to_clean(
    x: Array,
    s: Array,
    of_clean: Array,
    clean: Array,
    draws: Sequence[int],
    clip: tuple[float, float] | None = None,
) -> Factors:
    """Of steps prev = of_clean * (a sample + b output, clipped) + x * sample + s * noise."""
    if clip is not None:
        return Factors(x, 0 * x, s, clean, draws, clipped=Clipped(clean, clip, of_clean))
    return Factors(x + of_clean * clean[:, 0], of_clean * clean[:, 1], s, clean, draws)


def slope_of(clean: Array, sigma: Array) -> Array:
    """The factors of sample and output in (x - x0) / sigma, (steps, 2)"""
    return np.stack([1 - clean[:, 0], -clean[:, 1]], 1) / sigma[:, None].astype(WIDE)


def scales_of(scales: Array) -> Array | None:
    """As Factors has them, of what each step's is. That of a single step is unknown."""
    return np.append(1.0, scales[1:].astype(WIDE)) if len(scales) > 1 else None


def edm_of(own: Any, sigma: Array) -> tuple[Array, Array]:
    """The factors of sample and output in the clean sample, (steps, 2), and what a sample is multiplied by: Karras et
    al. 2022"""
    data = own.config.sigma_data
    variance = sigma**2 + data**2
    root = root_of(variance)
    signs = {"epsilon": 1, "v_prediction": -1}
    c_out = signs[own.config.prediction_type] * sigma * data / root
    return np.stack([data**2 / variance, c_out], 1).astype(WIDE), 1 / root
