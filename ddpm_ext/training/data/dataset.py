"""Training images in a tensor or a torch Dataset."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from ddpm_ext.training.data.source import DamagedImage, Labels, check_range, digest


class TensorImages:
    """An ImageSource in memory.

    Args:
        images: (count, channels, height, width) float32 in [-1, 1], count at least 1.
        labels: the classes of the images, for class-conditional training.

    Raises:
        ValueError: `images` has a wrong dtype, number of dimensions or range, or is empty.
    """

    seeded = False

    def __init__(self, images: Tensor, labels: Labels | None = None) -> None:
        if images.dim() != 4 or images.dtype != torch.float32 or not len(images):
            raise ValueError(
                f"images: got {images.dtype} of shape {tuple(images.shape)}, "
                "expected float32 of shape (count, channels, height, width), count at least 1"
            )
        images = images.detach().cpu().resolve_neg()
        self._check_values(images)
        self.images, self._labels = images, labels
        self.shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]

    def _check_values(self, images: Tensor) -> None:
        check_range("images: the tensor", images)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        return self.images[indices]

    def labels(self) -> Labels:
        """The labels that the caller passed. Raises ValueError if there are none."""
        if self._labels is None:
            raise ValueError("classes: a tensor of images has no labels, expected TensorDataset(images, labels)")
        return self._labels

    def fingerprint(self) -> str:
        """A hash of the images' shape and values. The labels have a hash of their own in a run."""
        return digest([repr(tuple(self.images.shape)).encode(), self.images.contiguous().numpy().data])


class DatasetImages:
    """An ImageSource over a map-style torch Dataset.

    The dataset's transforms may be random. Before an item is read, the generators of torch (on the CPU), numpy and
    Python get the item's seed, so that the item doesn't depend on earlier reads. Afterwards the generators' states are
    restored.

    Args:
        dataset: an item is an image, or a tuple whose first entry is an image. An image is a floating-point tensor
            (channels, height, width) in [-1, 1]. All images must have the shape of the first readable image.

    Raises:
        TypeError: the dataset has no length, or an item has no such tensor.
        ValueError: the dataset is empty, or the values of its first image are outside [-1, 1].
        DamagedImage: no item can be read.
    """

    seeded = True

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        try:
            self._count = len(dataset)
        except TypeError:
            kind = type(dataset).__name__
            raise TypeError(f"data: a {kind} has no length, expected a map-style torch Dataset") from None
        if not self._count:
            raise ValueError("data: the dataset is empty, expected at least one image")
        self._first, first = self._first_readable()
        check_range(f"data: item {self._first}", first)
        self.shape: tuple[int, int, int] = tuple(first.shape)  # type: ignore[assignment]

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        numbers = indices.tolist()
        images = [self._item(index, seed) for index, seed in zip(numbers, seeds or numbers, strict=True)]
        for index, image in zip(numbers, images, strict=True):
            if image.shape != self.shape:
                raise ValueError(
                    f"data: item {index} has shape {tuple(image.shape)}, expected {self.shape}, "
                    f"the shape of item {self._first}"
                )
        return torch.stack(images)

    def labels(self) -> Labels:
        """The dataset's labels, if it has them without reading images. Names are its `classes`, or else the numbers.

        Labels are the attribute `targets`, as in torchvision, before any target_transform; or the second tensor of a
        TensorDataset. A Subset takes the labels of its images from its dataset.

        Raises:
            ValueError: the dataset has no such labels, or they are not numbers.
        """
        numbers, names = _labels(self.dataset)
        if names is None:
            names = range(max(0, int(numbers.max())) + 1)
        return Labels(numbers, tuple(map(str, names)))

    def fingerprint(self) -> str:
        """The class of the dataset, its length and the shape of its images."""
        return f"{type(self.dataset).__qualname__} {self._count} {self.shape}"

    def _first_readable(self) -> tuple[int, Tensor]:
        """The index of the first readable item, and its image. Raises DamagedImage if no item can be read."""
        last = self._count - 1
        for index in range(last):
            with suppress(DamagedImage):
                return index, self._item(index, 0)
        return last, self._item(last, 0)

    def _item(self, index: int, seed: int) -> Tensor:
        try:
            with _generators_seeded(seed):
                item = self.dataset[index]
        except OSError as error:
            raise DamagedImage(f"data: cannot read item {index}: {error}") from error
        image = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
            description = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(
                f"data: item {index} is a {description}, expected a floating tensor (channels, height, width)"
            )
        return image.detach().to("cpu", torch.float32)


def _labels(dataset: Any) -> tuple[Tensor, Any]:
    """A dataset's labels, (count,) int64, and the names of its classes, or None if it has no names.

    Raises ValueError if the dataset has no labels, or they are not whole numbers.
    """
    if isinstance(dataset, Subset):
        numbers, names = _labels(dataset.dataset)
        return numbers[torch.as_tensor(dataset.indices, device="cpu")], names
    targets = getattr(dataset, "targets", None)
    if targets is None and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        targets = dataset.tensors[1]
    kind = type(dataset).__name__
    if targets is None:
        raise ValueError(f"classes: a {kind} has no labels, expected its attribute targets, one label an image")
    try:
        numbers = torch.as_tensor(targets, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"classes: the targets of a {kind} are no whole numbers ({error})") from error
    if numbers.is_floating_point() or numbers.is_complex() or not numbers.numel():
        raise ValueError(f"classes: the targets of a {kind} are {numbers.dtype}, expected whole numbers")
    return numbers.to(torch.int64), getattr(dataset, "classes", None)


@contextmanager
def _generators_seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of torch (on the CPU), numpy and Python. The end of the block restores their states."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
