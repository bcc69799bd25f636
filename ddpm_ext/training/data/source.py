"""The interface of sources of training images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_LARGEST_VALUE = 1.001  # slightly above 1, since transforms may round a pixel to slightly more than 1


class DamagedImage(ValueError):
    """An image can't be read; the message names it."""


class Labels(NamedTuple):
    """The class of each image.

    numbers: (count,) int64, in [0, len(names)).
    names: the names of the classes.

    Examples:
        >>> labels = Labels(torch.tensor([0, 1, 0]), ("cat", "dog"))
    """

    numbers: Tensor
    names: tuple[str, ...]


class ImageSource(Protocol):
    """A fixed number of images of one shape, from which the trainer takes batches.

    A source for class-conditional training also has a method labels() -> Labels, which may raise ValueError.

    shape: (channels, height, width).
    seeded: whether reading an image is random, so that `batch` needs seeds.

    Examples:
        >>> class Grey:  # sixteen grey images
        ...     shape, seeded = (1, 8, 8), False
        ...
        ...     def __len__(self):
        ...         return 16
        ...
        ...     def batch(self, indices, seeds=None):
        ...         return torch.zeros(len(indices), *self.shape)
        ...
        ...     def fingerprint(self):
        ...         return "sixteen grey images"
        >>> source = Grey()  # for data= of a Trainer
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
        """A text that differs for different images. A resume compares the text with that of the run's earlier start.

        Computing it need not read all images: a folder's fingerprint uses the names and sizes of its files.
        """
        ...


def check_range(name: str, images: Tensor) -> None:
    """Raises ValueError unless all values are in [-1, 1], up to rounding, and no value is NaN."""
    if images.numel():
        low, high = (value.item() for value in images.aminmax())
        if not -_LARGEST_VALUE <= low <= high <= _LARGEST_VALUE:
            raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, expected them in [-1, 1]")


def labels_of(images: ImageSource) -> Labels:
    """The classes of all images. Raises ValueError unless each image has a class."""
    labels_method = getattr(images, "labels", None)
    if not callable(labels_method):
        raise ValueError(f"classes: a {type(images).__name__} has no labels, expected images with labels")
    labels: Labels = labels_method()
    numbers, count = labels.numbers, len(labels.names)
    if numbers.shape != (len(images),) or numbers.dtype != torch.int64:
        raise ValueError(
            f"classes: labels are {numbers.dtype} of shape {tuple(numbers.shape)}, expected int64 of shape "
            f"({len(images)},), one an image"
        )
    low, high = (int(value) for value in numbers.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"classes: labels are {low} to {high}, expected 0 to {count - 1} for {count} classes")
    return labels


def digest(parts: Iterable[Any]) -> str:
    """A hash of the concatenation of bytes and buffers."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()
