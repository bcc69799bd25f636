"""The range that predicted clean samples are clipped to: no range, a fixed one, or one that depends on the sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops import reference

_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DynamicThreshold:
    """Clips each sample's predicted x_0 to [-bound, bound], then divides it by the bound (Saharia et al. 2022, section
    2.3).

    The bound is a quantile of the sample's |x_0|, but at least 1 and at most `maximum`.

    Args:
        quantile: in (0, 1].
        maximum: the largest bound, at least 1. It is sample_max_value in diffusers.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> clip = DynamicThreshold(quantile=0.995, maximum=10.0)
        >>> samples = GaussianDiffusion(1000).sample(model, 8, steps=20, clip_denoised=clip, progress=False)
    """

    quantile: float = 0.995
    maximum: float = math.inf

    def __post_init__(self) -> None:
        for name in ("quantile", "maximum"):
            checks.real(name, getattr(self, name))
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile is {self.quantile!r}, expected 0 < quantile <= 1")
        if not self.maximum >= 1:
            raise ValueError(f"maximum is {self.maximum!r}, expected at least 1")

    def x_start_scale(self, x_start: Tensor) -> Tensor:
        """1 / bound of each sample, (batch,), float32 (float64 for float64 samples)."""
        operators = reference if x_start.dtype == torch.float64 else ops  # the compiled operators don't take float64
        return operators.x_start_scale(x_start, quantile=self.quantile, maximum=self.maximum)


def as_clip(clip_denoised: bool | Clip | DynamicThreshold) -> tuple[Clip | None, DynamicThreshold | None]:
    """The fixed range to clip to, or None; and the dynamic threshold, or None.

    With a dynamic threshold the range is (-1, 1): a step first divides x_0 by the bound, then clips it to this range.
    """
    if isinstance(clip_denoised, DynamicThreshold):
        return (-1.0, 1.0), clip_denoised
    if isinstance(clip_denoised, bool):
        return ((-1.0, 1.0) if clip_denoised else None), None
    ends = clip_denoised
    is_pair = isinstance(ends, tuple | list) and len(ends) == 2
    if not is_pair or not all(isinstance(end, Real) and not isinstance(end, bool) for end in ends):
        raise TypeError(f"clip_denoised is {ends!r}, expected a bool, a range (low, high) or a DynamicThreshold")
    low, high = map(float, ends)
    if not low <= high:
        raise ValueError(f"clip_denoised is {ends!r}, expected low <= high")
    if any(_FLOAT32_MAX < abs(end) < math.inf for end in (low, high)):
        raise ValueError(f"clip_denoised is {ends!r}, expected numbers up to {_FLOAT32_MAX:.9g}, float32's largest")
    return (low, high), None


def as_fixed_clip(clip_denoised: bool | Clip) -> Clip | None:
    """The fixed range to clip to, or None. Raises TypeError for a DynamicThreshold, which only loops support."""
    clip, threshold = as_clip(clip_denoised)
    if threshold is not None:
        raise TypeError(f"clip_denoised is {threshold}, expected a bool or a range (low, high) outside of a loop")
    return clip
