"""Kullback-Leibler divergences and log-likelihoods of Gaussians: the terms of the variational bound.

All functions are elementwise and differentiable. Arguments broadcast, and some may be numbers. Arithmetic and results
are float64 if a tensor is float64, else float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks

__all__ = ["discretized_gaussian_log_likelihood", "normal_kl"]

HALF_BIN = 1 / 255  # half the distance between neighbouring values of an 8-bit image in [-1, 1]
_EDGE = 0.999  # of the 256 values, only -1 and 1 are beyond -_EDGE and _EDGE
# The coefficients of the series in e^d - 1 - d = d^2 / 2 (1 + d / 3 + d^2 / 12 + ...): enough of them for float64 and
# |d| < 1/2.
_EXPM1_REST = [2 / math.factorial(k + 2) for k in range(15)]
# The four positive nodes of Gauss-Legendre quadrature with eight nodes, which are symmetric, and their weights.
_NODES, _WEIGHTS = (values[4:].tolist() for values in np.polynomial.legendre.leggauss(8))


def _tensors(arguments: Mapping[str, Tensor | float]) -> list[Tensor]:
    """The values of {name: argument} as tensors of one device and dtype.

    Raises TypeError or ValueError if no argument is a tensor, one has a wrong type, dtype or device, or the shapes
    don't broadcast.
    """
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    names = f"{', '.join(list(arguments)[:-1])} and {list(arguments)[-1]}"
    if not tensors:
        raise TypeError(f"{names} are no tensors, expected one at least")
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor or a number")
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}, expected a floating one")
        if isinstance(value, Tensor) and value.device != tensors[0].device:
            raise ValueError(f"{name} is on {value.device}, expected {tensors[0].device}, like the other tensors")
    try:
        torch.broadcast_shapes(*(value.shape for value in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors)
        raise ValueError(f"{names} have shapes {shapes}, expected such as broadcast") from None
    wide = any(value.dtype == torch.float64 for value in tensors)
    dtype, device = torch.float64 if wide else torch.float32, tensors[0].device
    return [
        value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
        for value in arguments.values()
    ]


def normal_kl(
    mean1: Tensor | float, log_variance1: Tensor | float, mean2: Tensor | float, log_variance2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp log_variance1) || N(mean2, exp log_variance2)), in nats.

        (e^d - 1 - d + (mean1 - mean2)^2 / variance2) / 2,    d = log_variance1 - log_variance2

    It is accurate, without cancellation, also if the two Gaussians are nearly the same.

    Args:
        mean1, log_variance1, mean2, log_variance2: of any float dtype, broadcast. At least one must be a tensor; the
            others may be numbers.

    Returns:
        A tensor of the broadcast shape, float32 (float64 if an argument is), at least 0.

    Raises:
        TypeError, ValueError: no argument is a tensor, one has a wrong type, dtype or device, or the shapes don't
            broadcast.

    Examples:
        >>> normal_kl(torch.tensor(0.5), 0.0, 0.0, 0.0)
        tensor(0.1250)
    """
    mean1, log_variance1, mean2, log_variance2 = _tensors(
        {"mean1": mean1, "log_variance1": log_variance1, "mean2": mean2, "log_variance2": log_variance2}
    )
    d = log_variance1 - log_variance2
    near = d.abs() < 0.5
    small, large = torch.where(near, d, 0.0), torch.where(near, 1.0, d)
    series = torch.full_like(d, _EXPM1_REST[-1])
    for coefficient in reversed(_EXPM1_REST[:-1]):
        series = series * small + coefficient
    of_variances = torch.where(near, small**2 * series / 2, large.expm1() - large)
    of_means = ((mean1 - mean2) * (-log_variance2 / 2).exp()) ** 2
    return (of_variances + of_means) / 2


def discretized_gaussian_log_likelihood(x: Tensor, *, mean: Tensor | float, log_scale: Tensor | float) -> Tensor:
    """log P(x) of an 8-bit image in [-1, 1] under N(mean, exp(2 log_scale)), in nats: Ho et al. 2020, eq. (13).

    Each of the image's 256 levels has the probability of the interval of width 2/255 around it. The interval of the
    first level begins at minus infinity, and that of the last ends at infinity. The logarithm is accurate and its slope
    finite for any distance of x from the mean and for any narrow Gaussian, as long as the dtype can represent the
    numbers (for means in [-1, 1] down to a log_scale of -43, in float64 -350). Nothing is clamped.

    Args:
        x: in [-1, 1], of any float dtype (16 bits can't represent the levels). Below -0.999 it counts as the first
            level, above 0.999 as the last.
        mean, log_scale: broadcast against x. log_scale is the logarithm of the standard deviation.

    Returns:
        A tensor of the broadcast shape, float32 (float64 if an argument is), at most 0. Differentiable in mean and
        log_scale, and also in x, as if x were continuous.

    Raises:
        TypeError, ValueError: x is no tensor, an argument has a wrong type, dtype or device, or the shapes don't
            broadcast.

    Examples:
        >>> nats = discretized_gaussian_log_likelihood(images, mean=0.1, log_scale=-2.0)  # as images
    """
    checks.tensor("x", x)
    x, mean, log_scale = _tensors({"x": x, "mean": mean, "log_scale": log_scale})
    inverse = (-log_scale).exp()
    # The differences from the mean are exact in float64. If the scale is much smaller than the bin (the interval around
    # x), they are multiplied by a large number, and so would be their rounding errors.
    center = x.double() - mean.double()
    distance = center.abs()

    def scaled(value: Tensor) -> Tensor:
        return value.to(x.dtype) * inverse

    # The ends and the middle of the bin in standard deviations from the mean, mirrored so that the middle is >= 0.
    low, high, middle = scaled(distance - HALF_BIN), scaled(distance + HALF_BIN), scaled(distance)
    half = HALF_BIN * inverse
    edge = x.abs() > _EDGE
    narrow = (half < 0.5) & (middle * half < 1)
    around = ~narrow & (low <= 0)  # the bin contains the mean
    one_sided = ~narrow & ~around

    # For elements where torch.where does not select a formula, the formula gets a harmless number. Otherwise its slope
    # might be infinite for them, and the gradient of torch.where would be NaN.
    in_narrow = _log_of_narrow(torch.where(narrow, middle, 0.0), torch.where(narrow, half, 0.1), log_scale)
    outside = _tail(torch.where(around, high, 1.0)) + _tail(torch.where(around, -low, 1.0))
    # The logarithm of tail(high) / tail(low). In it, (low^2 - high^2) / 2 is written as -2 middle half, which does not
    # cancel.
    far_end, near_end = torch.where(one_sided, high, 2.0), torch.where(one_sided, low, 1.0)
    beyond = _log_erfcx(far_end) - _log_erfcx(near_end) - 2 * torch.where(one_sided, middle * half, 1.0)
    open_end = scaled(torch.where(x > 0, center, -center) - HALF_BIN)
    tail = _log_tail(torch.where(edge, open_end, low))
    inner = torch.where(around, torch.log1p(-outside), tail + torch.log1p(-beyond.exp()))
    return torch.where(edge, tail, torch.where(narrow, in_narrow, inner))


def _tail(z: Tensor) -> Tensor:
    """The probability that a standard normal exceeds z, without cancellation for z >= 0."""
    return torch.erfc(z * math.sqrt(0.5)) / 2


def _log_erfcx(z: Tensor) -> Tensor:
    """log(2 tail(z)) + z^2 / 2, for z >= 0."""
    return torch.special.erfcx(z * math.sqrt(0.5)).log()


def _log_tail(z: Tensor) -> Tensor:
    """The logarithm of the probability that a standard normal exceeds z.

    torch.special.log_ndtr(-z) has the same value, but its slope is the exponential of a difference of squares: for
    large z it is wrong in float32, and for larger z infinite.
    """
    far = z > 1
    beyond = torch.where(far, z, 1.0)
    return torch.where(
        far, _log_erfcx(beyond) - math.log(2) - beyond**2 / 2, torch.log1p(-_tail(-torch.where(far, 0.0, z)))
    )


def _log_of_narrow(middle: Tensor, half: Tensor, log_scale: Tensor) -> Tensor:
    """The logarithm of a standard normal's probability of [middle - half, middle + half].

    It is the density at the middle, times the width, times the mean of exp(-middle u - u^2 / 2) over |u| < half. The
    mean is computed by Gauss-Legendre quadrature, which is accurate for half < 1/2 and middle half < 1. The width is
    2 HALF_BIN / exp(log_scale), so its logarithm is computed from log_scale.
    """
    mean = torch.zeros_like(middle)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        u = node * half
        mean = mean + weight * torch.exp(-(u**2) / 2) * torch.cosh(middle * u)
    log_width = math.log(2 * HALF_BIN / math.sqrt(2 * math.pi)) - log_scale
    return log_width - middle**2 / 2 + mean.log()
