"""Averages of the weights whose length is a share of the training so far, and what combines them into other lengths.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. After
step t, weights of step s count in proportion to the integral of tau^gamma from s - 1 to s. The length is the standard
deviation of tau / t under that density, sigma_rel in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTHS = (0.05, 0.10)
"""The lengths of the averages that a run keeps, the paper's."""
LONGEST = 0.288
"""Just below that of the plain mean over all steps, gamma = 0, which is sqrt(1/12)."""

Numbers = npt.NDArray[Any]


def exponent(length: float) -> float:
    """gamma: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which is a cubic equation for it."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(length: float, step: int) -> float:
    """The share of itself that the average keeps in a step, counted from 1: those of step 1 are the first weights."""
    return float((1 - 1 / step) ** (exponent(length) + 1))


def combination(steps: Sequence[int], lengths: Sequence[float], step: int, length: float) -> tuple[Numbers, float]:
    """The factors of snapshots whose sum is nearest to the average of `length` after `step`; their own sum is 1.

    Args:
        steps, lengths: of each snapshot.

    Returns:
        (snapshots,) float64, and how far the sum's profile, the factors of the weights of all steps, is from the wanted
        one: the root of the squared distance, as a share of the wanted one's norm.
    """
    times, gammas = np.array([*steps, step], np.float64), np.array([exponent(value) for value in (*lengths, length)])
    products = _products(times[:, None], gammas[:, None], times, gammas)
    within, wanted, norm = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    factors = np.linalg.lstsq(within, wanted, rcond=None)[0]
    factors /= factors.sum()
    distance = (norm - 2 * factors @ wanted + factors @ within @ factors) / norm
    return factors, float(np.sqrt(max(0.0, distance)))


def _products(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> Numbers:
    """The integrals of the products of the densities (gamma + 1) tau^gamma / t^(gamma + 1) on (0, t)."""
    earlier, later, of_later = np.minimum(t_a, t_b), np.maximum(t_a, t_b), np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** of_later / later
