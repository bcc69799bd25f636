"""Images to train on, as float32 tensors (count, channels, height, width) in [-1, 1]."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.optional import require

__all__ = [
    "DamagedImage",
    "DatasetImages",
    "FolderImages",
    "Images",
    "TensorImages",
    "as_images",
    "digits",
    "load_images",
]

DIGITS_PARTS = ("train", "heldout", "all")
# One image in seven is held out. Seven has no factor in common with ten: the digits stand in cycles of ten in the set,
# so both parts hold every digit about equally often.
_HELD_OUT_EVERY = 7

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_CACHE_BYTES = 1 << 29
# What its decoders let through at a damaged file
_PILLOWS_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
_OUTSIDE = 1.001  # what rounding may add to 1


class DamagedImage(ValueError):
    """An image that can't be read; the message names it."""


class Images(Protocol):
    """What the trainer reads: a number of images of one shape."""

    shape: tuple[int, int, int]
    """(channels, height, width)"""

    seeded: bool
    """whether reading an image is random"""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        """The images at `indices`, (batch,) int64, as (batch, channels, height, width) float32 in [-1, 1].

        `seeds`, one an image: what all that is random in reading it follows from.

        Raises DamagedImage for one that can't be read.
        """
        ...

    def fingerprint(self) -> str:
        """Another one for other images, as far as it is told without reading them all."""
        ...


class TensorImages:
    """Images held in memory: `images` is (count, channels, height, width) float32, in [-1, 1]."""

    seeded = False

    def __init__(self, images: Tensor) -> None:
        if images.dim() != 4 or images.dtype != torch.float32 or not len(images):
            raise ValueError(
                f"images: got {images.dtype} of shape {tuple(images.shape)}, "
                "expected float32 of shape (count, channels, height, width), count at least 1"
            )
        images = images.detach().cpu()
        _check_range("images: the tensor", images)
        self.images = images
        self.shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        return self.images[indices]

    def fingerprint(self) -> str:
        """Of shape and pixels."""
        return _digest([repr(tuple(self.images.shape)).encode(), self.images.contiguous().numpy().data])


class DatasetImages:
    """A map-style torch Dataset, whose items are images, or tuples whose first is one.

    An image is a tensor (channels, height, width), floating, in [-1, 1]; all have the shape of the first that can be
    read. While an item is
    read, the generators of torch (on the CPU), numpy and Python start from a seed of its own, so that random transforms
    give the same whatever was read before; outside, they stay as they were.

    Raises TypeError or ValueError for a dataset that is empty or has no length, or an item that is something else.
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
        self._first, first = self._first_good()
        _check_range(f"data: item {self._first}", first)
        self.shape: tuple[int, int, int] = tuple(first.shape)  # type: ignore[assignment]

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        wanted = indices.tolist()
        images = [self._item(index, seed) for index, seed in zip(wanted, seeds or wanted, strict=True)]
        for index, image in zip(wanted, images, strict=True):
            if image.shape != self.shape:
                raise ValueError(
                    f"data: item {index} has shape {tuple(image.shape)}, expected {self.shape}, as item {self._first}"
                )
        return torch.stack(images)

    def fingerprint(self) -> str:
        """Of the dataset's class, length and shape."""
        return f"{type(self.dataset).__qualname__} {self._count} {self.shape}"

    def _first_good(self) -> tuple[int, Tensor]:
        """An item that can be read, and which; raises DamagedImage where there is none."""
        for index in range(self._count):
            try:
                return index, self._item(index, 0)
            except DamagedImage:
                if index == self._count - 1:
                    raise
        raise AssertionError  # there is an item at least

    def _item(self, index: int, seed: int) -> Tensor:
        try:
            with _seeded(seed):
                item = self.dataset[index]
        except OSError as error:
            raise DamagedImage(f"data: cannot read item {index}: {error}") from error
        image = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"data: item {index} is a {found}, expected a floating tensor (channels, height, width)")
        return image.detach().to("cpu", torch.float32)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
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


class FolderImages:
    """The images in a folder and the folders below it, in the order of their names.

    Each is turned upright by its EXIF tag, cropped to its middle square, resized to `size` and converted to `channels`
    (1: grey, 3: colour). Decoded images are kept in memory as far as half a GiB, in each process, holds them.

    Raises ValueError for a folder that is missing or has no images, and, when it is read, DamagedImage.
    """

    seeded = False

    def __init__(self, folder: str | os.PathLike[str], size: int, channels: int = 3) -> None:
        if size < 1:
            raise ValueError(f"image size: got {size}, expected at least 1")
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 1 (grey) or 3 (colour)")
        require("PIL.Image", "reading images")
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data: no such folder: {folder}")
        self.root = root
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not self.paths:
            raise ValueError(f"data: no images in {folder}, expected files ending in {' '.join(sorted(_SUFFIXES))}")
        self.shape: tuple[int, int, int] = (channels, size, size)
        self._cached: dict[int, Tensor] = {}
        self._cache_limit = _CACHE_BYTES // (channels * size * size)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        pixels = torch.stack([self._pixels(index) for index in indices.tolist()])
        return pixels.float().div_(127.5).sub_(1)

    def fingerprint(self) -> str:
        """Of the files' names and sizes, wherever the folder is."""
        names = (f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n" for path in self.paths)
        return _digest([repr(self.shape).encode(), *(name.encode("utf-8", "surrogateescape") for name in names)])

    def _pixels(self, index: int) -> Tensor:
        """(channels, size, size) uint8"""
        found = self._cached.get(index)
        if found is None:
            found = _read(self.paths[index], self.shape)
            if len(self._cached) < self._cache_limit:
                self._cached[index] = found
        return found


def _read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    from PIL import Image, ImageOps

    channels, size, _ = shape
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith(("I", "F")):
                raise DamagedImage(f"data: {path} has {upright.mode} pixels, expected 8 bits a channel")
            plain = upright.convert("RGB" if channels == 3 else "L")
            # Fits the shorter side to `size` and cuts the longer one down to its middle.
            square = ImageOps.fit(plain, (size, size), method=Image.Resampling.BICUBIC)
    except DamagedImage:
        raise
    except (*_PILLOWS_ERRORS, Image.DecompressionBombError) as error:
        raise DamagedImage(f"data: cannot read {path}: {error}") from error
    return torch.from_numpy(np.array(square)).reshape(size, size, channels).permute(2, 0, 1).contiguous()


def digits(part: str = "all") -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits (`load_digits`): 1,797 grey images of 8 by 8 pixels, in its own order.

    `part`: "train" (1,541), "heldout" (256: every seventh) or "all".

    Returns images (count, 1, 8, 8) float32 in [-1, 1] and labels (count,) int64, 0 to 9.
    """
    if part not in DIGITS_PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(DIGITS_PARTS)}")
    found = require("sklearn.datasets", "the digits data set").load_digits()
    images = torch.from_numpy(found.images).float().div_(8).sub_(1).unsqueeze(1)  # pixels are 0 to 16
    labels = torch.from_numpy(found.target).long()
    held_out = torch.arange(len(labels)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    chosen = {"train": ~held_out, "heldout": held_out, "all": torch.ones_like(held_out)}[part]
    return images[chosen], labels[chosen]


def load_images(source: str, size: int | None = None, channels: int | None = None) -> Images:
    """`source` is "digits" (the part for training) or a folder of images, which needs a `size`.

    `channels`: 1 or 3; None is 1 for digits and 3 for a folder. Digits come as they are: 8 by 8, grey.
    """
    if source != "digits":
        if size is None:
            raise ValueError("image size: a folder of images needs one")
        return FolderImages(source, size, 3 if channels is None else channels)
    if size not in (None, 8):
        raise ValueError(f"image size: got {size}, but digits are 8 by 8 pixels")
    if channels not in (None, 1):
        raise ValueError(f"channels: got {channels}, but digits have 1")
    return TensorImages(digits("train")[0])


def as_images(data: Any, size: int | None = None, channels: int | None = None) -> Images:
    """What the trainer takes as data: a name for load_images, a tensor, a torch Dataset, or Images as they are.

    `size` and `channels` belong to a name; everything else has them.
    """
    if isinstance(data, str | os.PathLike):
        return load_images(os.fspath(data), size, channels)
    if isinstance(data, Tensor):
        return TensorImages(data)
    if callable(getattr(data, "batch", None)) and callable(getattr(data, "fingerprint", None)):
        return data
    if not hasattr(data, "__getitem__"):
        kind = type(data).__name__
        raise TypeError(f"data is a {kind}, expected 'digits', a folder, a tensor or a map-style torch Dataset")
    return DatasetImages(data)


def _check_range(name: str, images: Tensor) -> None:
    """Raises ValueError, also for NaN."""
    if images.numel():
        low, high = (value.item() for value in images.aminmax())
        if not -_OUTSIDE <= low <= high <= _OUTSIDE:
            raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, expected them in [-1, 1]")


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
