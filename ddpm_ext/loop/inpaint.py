"""Inpaint, an option of the sampling loop for samples of which a part is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ext.base import checks


@dataclass(frozen=True)
class Inpaint:
    """Inpainting. After each step, the known part of the samples is replaced by `known`, as noisy as the samples.

    Args:
        known: (batch, ...), clean samples, of the loop's shape.
        mask: 1 where the samples are known, 0 where they are not; a number between them is the known sample's share.
            A bool or floating tensor that broadcasts to the shape of `known`.
        jump_length, jump_n_sample: RePaint's resampling (Lugmayr et al. 2022, section 4.2). Each sequence of
            `jump_length` steps is taken `jump_n_sample` times. Before it is repeated, noise is added to return to the
            level where it began. A jump_n_sample of 1 means no resampling.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or device, or is out of range.

    Examples:
        >>> left = torch.arange(8) < 4  # the left half of images that are 8 wide is known
        >>> inpaint = Inpaint(images, left, jump_length=5, jump_n_sample=3)
        >>> samples = GaussianDiffusion(1000).sample(model, 8, batch_size=4, steps=20, inpaint=inpaint, progress=False)
    """

    known: Tensor
    mask: Tensor
    jump_length: int = 10
    jump_n_sample: int = 1

    def __post_init__(self) -> None:
        checks.samples("known", self.known)
        checks.tensor("mask", self.mask)
        if self.mask.dtype != torch.bool and not self.mask.is_floating_point():
            raise TypeError(f"mask has dtype {self.mask.dtype}, expected bool or a floating one")
        if self.mask.device != self.known.device:
            raise ValueError(f"mask is on {self.mask.device}, expected known's device, {self.known.device}")
        try:
            self.mask.expand(self.known.shape)
        except RuntimeError:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}, expected one that broadcasts to known's, "
                f"{tuple(self.known.shape)}"
            ) from None
        if self.mask.is_cpu and not ((self.mask >= 0) & (self.mask <= 1)).all():
            least, most = self.mask.min(), self.mask.max()
            raise ValueError(f"mask reaches from {least} to {most}, expected all in 0 <= mask <= 1")
        checks.integer("jump_length", self.jump_length, 2**31, "2^31", start=1)
        checks.integer("jump_n_sample", self.jump_n_sample, 2**31, "2^31", start=1)

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`known` and `mask` for the kernels, with the shape of the loop's samples x and contiguous."""
        checks.like("known", self.known, "x_t", x)
        return self.known.contiguous(), self.mask.to(x.dtype).expand(x.shape).contiguous()
