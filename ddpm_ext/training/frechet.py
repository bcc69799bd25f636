"""The Fréchet distance between two sets of features (Heusel et al. 2017, eq. 6), by which samples are scored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments", "frechet", "moments"]

Moments = tuple[Tensor, Tensor]
"""A mean, (features,), and a matrix whose product with its own transpose from the left is the covariance."""


def moments(features: Tensor) -> Moments:
    """The mean of features, (count, features) float64 with count at least 2, and a factor of their covariance."""
    count, size = features.shape
    mean = features.mean(0)
    factor = (features - mean) / (count - 1) ** 0.5
    return mean, torch.linalg.qr(factor, mode="r").R if count > size else factor


def frechet(one: Moments, other: Moments) -> float:
    """The squared distance of two Gaussians: |m - n|^2 + tr(C + D - 2 (C D)^(1/2)); 0 for the same ones.

    With C = A^T A and D = B^T B the eigenvalues of C D are the squared singular values of A B^T. These are real
    numbers whatever the rank, so that fewer samples than features are enough.
    """
    (mean, factor), (other_mean, other_factor) = one, other
    traces = factor.square().sum() + other_factor.square().sum()
    shared = torch.linalg.svdvals(factor @ other_factor.T).sum()
    return max(0.0, float((mean - other_mean).square().sum() + traces - 2 * shared))
