"""How far samples end from the teacher's, and what stands for many of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

NEAREST = 0.9


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The distances of some samples to the teacher's, each the root of the mean square of a sample's differences, in
    the samples' units.

    error: the mean of the nearest 90 % of the samples: a few end in another image altogether, with any sampler, and
    which ones is chance. standard_error: of that mean. mean, median: of all samples.
    """

    error: float
    standard_error: float
    mean: float
    median: float

    @classmethod
    def of(cls, distances: Tensor) -> Errors:
        """What stands for these distances, (samples,)."""
        # A trimmed mean's standard error is that of samples where those left out are as far as the farthest counted.
        nearest = _nearest(distances)
        spread = distances.clamp(max=nearest[-1]).std(correction=0).item()
        standard_error = spread * math.sqrt(len(distances)) / len(nearest)
        mean, median = distances.mean().item(), distances.median().item()
        return Errors(error=typical(distances), standard_error=standard_error, mean=mean, median=median)


def distance(samples: Tensor, truth: Tensor) -> Tensor:
    """Of each sample to its truth, float64 (batch,) on the CPU."""
    return (samples.double() - truth.double()).flatten(1).square().mean(1).sqrt().cpu()


def typical(distances: Tensor) -> float:
    """The mean of the nearest 90 %; infinity where any is not finite."""
    return _nearest(distances).mean().item() if bool(distances.isfinite().all()) else math.inf


def _nearest(distances: Tensor) -> Tensor:
    return distances.sort().values[: math.ceil(NEAREST * len(distances))]
