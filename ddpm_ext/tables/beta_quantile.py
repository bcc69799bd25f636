"""Quantiles of the beta distribution, which torch does not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 10.0  # the largest parameter; with larger ones, the terms of the power series cancel
# The number of terms of the power series, and of steps of the bisection: enough for float64, since x is at most 1/2.
TERMS, HALVINGS = 64, 80


def beta_quantile(p: Tensor, alpha: float, beta: float) -> Tensor:
    """The quantiles of a beta distribution: each x below which the distribution has the probability p.

    Args:
        p: of any shape, in [0, 1].
        alpha, beta: above 0, at most 10.

    Returns:
        float64 of p's shape on the CPU, exact to about 1e-12.

    Raises:
        ValueError: a parameter out of range.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value <= LARGEST:
            raise ValueError(f"{name} is {value}, expected 0 < {name} <= {LARGEST:g}")
    p = p.to("cpu", torch.float64)
    middle = _below(torch.full_like(p, 0.5), alpha, beta)
    return torch.where(p <= middle, _lower(p, alpha, beta), 1 - _lower(1 - p, beta, alpha))


def _lower(p: Tensor, alpha: float, beta: float) -> Tensor:
    """The quantiles of probabilities p whose quantiles are at most 1/2.

    The bisection is over x^alpha and not over x, because the probability is nearly linear in x^alpha.
    """
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5**alpha)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = _below(middle ** (1 / alpha), alpha, beta) < p
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return low ** (1 / alpha)  # `low` stays exactly 0 where p is 0


def _below(x: Tensor, alpha: float, beta: float) -> Tensor:
    """The probability that the beta distribution has below x, for x of at most 1/2.

    This is a power series: NIST's Digital Library of Mathematical Functions, 8.17.7 and 15.2.1.
    """
    n = torch.arange(TERMS, dtype=torch.float64, device="cpu")
    factors = torch.cat([n.new_ones(1), ((n[1:] - beta) / n[1:]).cumprod(0)]) / (alpha + n)
    scale = math.exp(math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta))
    return scale * x**alpha * (factors * x.unsqueeze(-1) ** n).sum(-1)
