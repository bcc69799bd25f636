"""The distances of samples to the teacher's samples, and their statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

NEAREST = 0.9  # the error is the mean distance of this share of the samples, those with the smallest distances


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Statistics of the distances of samples to the teacher's samples.

    A distance is the root of the mean square of a sample's differences, in the samples' units.

    Attributes:
        error: the mean of the smallest 90 % of the distances. With any sampler, a few samples become another image than
            the teacher's. Their large distances depend on chance, so they are left out.
        standard_error: the standard error of `error`.
        mean, median: the mean and the median of all distances.
    """

    error: float
    standard_error: float
    mean: float
    median: float

    @classmethod
    def of(cls, distances: Tensor) -> Errors:
        """The statistics of these distances, (samples,)."""
        # The standard error of a trimmed mean: distances that `error` leaves out count as the largest that it includes.
        nearest = _nearest(distances)
        spread = distances.clamp(max=nearest[-1]).std(correction=0).item()
        standard_error = spread * math.sqrt(len(distances)) / len(nearest)
        mean, median = distances.mean().item(), distances.median().item()
        return Errors(error=typical(distances), standard_error=standard_error, mean=mean, median=median)


def distance(samples: Tensor, truth: Tensor) -> Tensor:
    """The distance of each sample to the teacher's sample in `truth`, float64 (batch,) on the CPU."""
    return (samples.double() - truth.double()).flatten(1).square().mean(1).sqrt().cpu()


def typical(distances: Tensor) -> float:
    """The mean of the smallest 90 % of the distances; infinity if any distance is not finite."""
    return _nearest(distances).mean().item() if bool(distances.isfinite().all()) else math.inf


def _nearest(distances: Tensor) -> Tensor:
    """The smallest 90 % of the distances, ascending."""
    return distances.sort().values[: math.ceil(NEAREST * len(distances))]
