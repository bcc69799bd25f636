"""Training images in a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.training.data.source import Labels, check_range, digest

__all__ = ["TensorImages"]


class TensorImages:
    """An ImageSource in memory.

    Args:
        images: (count, channels, height, width) float32 in [-1, 1], count at least 1.
        labels: the classes of the images, for class-conditional training.

    Raises:
        ValueError: another dtype, number of dimensions or range, or no images.
    """

    seeded = False

    def __init__(self, images: Tensor, labels: Labels | None = None) -> None:
        if images.dim() != 4 or images.dtype != torch.float32 or not len(images):
            raise ValueError(
                f"images: got {images.dtype} of shape {tuple(images.shape)}, "
                "expected float32 of shape (count, channels, height, width), count at least 1"
            )
        images = images.detach().cpu()
        check_range("images: the tensor", images)
        self.images, self._labels = images, labels
        self.shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        return self.images[indices]

    def labels(self) -> Labels:
        """The labels that were given; raises ValueError if none were."""
        if self._labels is None:
            raise ValueError("classes: a tensor of images has no labels, expected TensorDataset(images, labels)")
        return self._labels

    def fingerprint(self) -> str:
        """A hash of the shape and of all values."""
        return digest([repr(tuple(self.images.shape)).encode(), self.images.contiguous().numpy().data])
