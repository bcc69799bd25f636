"""Power averages of the weights: their length is a share of the training so far. Snapshots of averages of two lengths
combine into averages of other lengths.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. After
step t, the weights of step s count in proportion to the integral of tau^gamma from s - 1 to s. The length is the
standard deviation of tau / t under this density, sigma_rel in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTHS = (0.05, 0.10)
"""The lengths of the averages that a run keeps, as in the paper."""
LONGEST = 0.288
"""Just below sqrt(1/12), the length of the plain mean over all steps (gamma = 0)."""

Numbers = npt.NDArray[Any]


def exponent(length: float) -> float:
    """The gamma of averages of this length: the largest solution of
    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(length: float, step: int) -> float:
    """The factor by which a step multiplies the average. Steps count from 1; in step 1 the factor is 0."""
    return float((1 - 1 / step) ** (exponent(length) + 1))


def combination(steps: Sequence[int], lengths: Sequence[float], step: int, length: float) -> tuple[Numbers, float]:
    """Computes by which factors to sum snapshots, so that the sum is nearest to the average of `length` after `step`.

    Args:
        steps, lengths: the step and the length of each snapshot.

    Returns:
        The factors, (snapshots,) float64, with sum 1; and the norm of the difference between the sum's profile and the
        exact profile, divided by the exact profile's norm. A profile is the factors of the weights of all steps.
    """
    times, gammas = np.array([*steps, step], np.float64), np.array([exponent(value) for value in (*lengths, length)])
    products = _products(times[:, None], gammas[:, None], times, gammas)
    gram, projections, norm = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    factors = np.linalg.lstsq(gram, projections, rcond=None)[0]
    factors /= factors.sum()
    distance = (norm - 2 * factors @ projections + factors @ gram @ factors) / norm
    return factors, float(np.sqrt(max(0.0, distance)))


def _products(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> Numbers:
    """The integral of the product of the densities a and b, for each pair of them (the arguments are broadcast).

    A density is (gamma + 1) tau^gamma / t^(gamma + 1) for tau in (0, t), and 0 elsewhere.
    """
    earlier, later, later_gamma = np.minimum(t_a, t_b), np.maximum(t_a, t_b), np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** later_gamma / later
