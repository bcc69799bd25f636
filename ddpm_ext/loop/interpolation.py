"""Interpolation, an option of the sampling loop to begin from a mixture of two images."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ext.base import checks


@dataclass(frozen=True)
class Interpolation:
    """Begins a loop from a mixture of two images (Ho et al. 2020, section 4.3; Song et al. 2021, appendix D.5).

    Noise of the first step's level is added to both images, different noise to each. Then the noisy images are mixed.

    Args:
        first, second: (batch, ...), clean samples of the loop's shape.
        weight: the weight of `second`, from 0 to 1, a float or a tensor (batch,).
        method: "slerp" interpolates along the great circle, which preserves the noise's variance; "lerp" linearly.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.

    Examples:
        >>> path = Interpolation(images, -images, weight=torch.linspace(0, 1, 4))
        >>> options = {"sampler": "ddim", "steps": 20, "progress": False}
        >>> samples = GaussianDiffusion(1000).sample(model, 8, batch_size=4, start=path, strength=0.5, **options)
    """

    first: Tensor
    second: Tensor
    weight: float | Tensor = 0.5
    method: str = "slerp"

    def __post_init__(self) -> None:
        checks.samples("first", self.first)
        checks.like("second", self.second, "first", self.first)
        checks.one_of("method", self.method, ("slerp", "lerp"))
        if isinstance(self.weight, Tensor):
            if self.weight.shape != self.first.shape[:1] or not self.weight.is_floating_point():
                raise ValueError(
                    f"weight has shape {tuple(self.weight.shape)} and dtype {self.weight.dtype}, expected a floating "
                    f"({len(self.first)},), one a sample"
                )
            if self.weight.is_cpu and not ((self.weight >= 0) & (self.weight <= 1)).all():
                raise ValueError(f"weight is {self.weight}, expected 0 <= weight <= 1")
        elif isinstance(self.weight, bool) or not isinstance(self.weight, numbers.Real):
            raise TypeError(f"weight is {self.weight!r}, expected a float or a tensor (batch,)")
        elif not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}, expected 0 <= weight <= 1")

    def mix(self, first: Tensor, second: Tensor) -> Tensor:
        """The mixture of the noisy images."""
        return slerp(first, second, self.weight) if self.method == "slerp" else _lerp(first, second, self.weight)


def _per_sample(weight: float | Tensor, x: Tensor) -> Tensor:
    """The weight as (batch, 1, ...) or (1, 1, ...), on x's device."""
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
    return weight.reshape(-1, *[1] * (x.dim() - 1))


def _lerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    w = _per_sample(weight, first)
    return (1 - w) * first + w * second


def slerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation of each sample (Song et al. 2021, eq. 67); linear for parallel samples.

    Args:
        first, second: (batch, ...).
        weight: the weight of `second`, a float or a tensor (batch,).

    Returns:
        A tensor like `first`.

    Examples:
        >>> from ddpm_ext.loop.interpolation import slerp
        >>> between = slerp(x_t, x_t.flip(0), 0.25)
    """
    dtype = checks.compute_dtype(first.dtype)
    a, b = first.to(dtype), second.to(dtype)
    w = _per_sample(weight, a)
    cosine = torch.nn.functional.cosine_similarity(a[:, None].flatten(1), b[:, None].flatten(1), dim=1)
    angle = _per_sample(cosine.clamp(-1, 1).acos(), a)
    is_parallel = angle.sin() < 1e-4
    sine = torch.where(is_parallel, 1, angle.sin())
    mixed = ((1 - w) * angle).sin() / sine * a + (w * angle).sin() / sine * b
    return torch.where(is_parallel, _lerp(a, b, w.flatten()), mixed).to(first.dtype)
