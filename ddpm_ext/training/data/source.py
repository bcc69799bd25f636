"""What every source of training images has in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["DamagedImage", "ImageSource", "check_range", "digest"]

_LARGEST = 1.001  # rounding may have made an image a little larger than 1


class DamagedImage(ValueError):
    """An image can't be read; the message names it."""


class ImageSource(Protocol):
    """A fixed number of images of one shape, from which the trainer takes batches.

    shape: (channels, height, width).
    seeded: whether reading an image is random, so that `batch` needs seeds.
    """

    shape: tuple[int, int, int]
    seeded: bool

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        """Reads images.

        Args:
            indices: (batch,) int64.
            seeds: one for each image. The same seed and index give the same image.

        Returns:
            (batch, channels, height, width) float32 in [-1, 1].

        Raises:
            DamagedImage: an image can't be read.
        """
        ...

    def fingerprint(self) -> str:
        """A text that changes with the images, as far as this shows without reading them all."""
        ...


def check_range(name: str, images: Tensor) -> None:
    """Raises ValueError unless all values are in [-1, 1]; NaN is not."""
    if images.numel():
        low, high = (value.item() for value in images.aminmax())
        if not -_LARGEST <= low <= high <= _LARGEST:
            raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, expected them in [-1, 1]")


def digest(parts: Iterable[Any]) -> str:
    """A hash of bytes and buffers, one after the other."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
