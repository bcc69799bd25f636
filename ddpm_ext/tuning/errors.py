"""The distances of samples to the teacher's samples, and their statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

NEAREST = 0.9


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Statistics of the distances of samples to the teacher's samples.

    A distance is the root of the mean square of a sample's differences, in the samples' units.

    Attributes:
        error: the mean of the nearest 90 % of the samples. With any sampler a few samples end in another image
            altogether, and chance decides which.
        standard_error: the standard error of `error`.
        mean, median: of all samples.
    """

    error: float
    standard_error: float
    mean: float
    median: float

    @classmethod
    def of(cls, distances: Tensor) -> Errors:
        """The statistics of these distances, (samples,)."""
        # For the standard error of a trimmed mean, the trimmed distances are set to the largest one that is counted.
        nearest = _nearest(distances)
        spread = distances.clamp(max=nearest[-1]).std(correction=0).item()
        standard_error = spread * math.sqrt(len(distances)) / len(nearest)
        mean, median = distances.mean().item(), distances.median().item()
        return Errors(error=typical(distances), standard_error=standard_error, mean=mean, median=median)


def distance(samples: Tensor, truth: Tensor) -> Tensor:
    """The distance of each sample to its truth, float64 (batch,) on the CPU."""
    return (samples.double() - truth.double()).flatten(1).square().mean(1).sqrt().cpu()


def typical(distances: Tensor) -> float:
    """The mean of the nearest 90 %; infinity if any distance is not finite."""
    return _nearest(distances).mean().item() if bool(distances.isfinite().all()) else math.inf


def _nearest(distances: Tensor) -> Tensor:
    return distances.sort().values[: math.ceil(NEAREST * len(distances))]
