"""Images to train on, as float32 tensors (count, channels, height, width) in [-1, 1]."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.extras import require

__all__ = ["FolderImages", "Images", "TensorImages", "digits", "load_images"]

DIGITS_PARTS = ("train", "heldout", "all")
# One image in seven is held out. Seven has no factor in common with ten: the digits stand in cycles of ten in the set,
# so both parts hold every digit about equally often.
_HELD_OUT_EVERY = 7

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_CACHE_BYTES = 1 << 29


class Images(Protocol):
    """What the trainer reads: a number of images of one shape."""

    shape: tuple[int, int, int]
    """(channels, height, width)"""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """The images at `indices`, (batch,) int64, as (batch, channels, height, width) float32 in [-1, 1]."""
        ...


class TensorImages:
    """Images held in memory: `images` is (count, channels, height, width) float32."""

    def __init__(self, images: Tensor) -> None:
        if images.dim() != 4 or images.dtype != torch.float32 or not len(images):
            raise ValueError(
                f"images: got {images.dtype} of shape {tuple(images.shape)}, "
                "expected float32 of shape (count, channels, height, width), count at least 1"
            )
        self.images = images
        self.shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Tensor:
        return self.images[indices]


class FolderImages:
    """The images in a folder and the folders below it, in the order of their names.

    Each is turned upright by its EXIF tag, cropped to its middle square, resized to `size` and converted to `channels`
    (1: grey, 3: colour). Decoded images are kept in memory as far as half a GiB holds them.

    Raises ValueError for a folder that is missing or has no images, and, when it is read, for a damaged image.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int, channels: int = 3) -> None:
        if size < 1:
            raise ValueError(f"image size: got {size}, expected at least 1")
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 1 (grey) or 3 (colour)")
        require("PIL.Image", "reading images")
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data: no such folder: {folder}")
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not self.paths:
            raise ValueError(f"data: no images in {folder}, expected files ending in {' '.join(sorted(_SUFFIXES))}")
        self.shape: tuple[int, int, int] = (channels, size, size)
        self._cached: dict[int, Tensor] = {}
        self._cache_limit = _CACHE_BYTES // (channels * size * size)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor) -> Tensor:
        pixels = torch.stack([self._pixels(index) for index in indices.tolist()])
        return pixels.float().div_(127.5).sub_(1)

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
                raise ValueError(f"data: {path} has {upright.mode} pixels, expected 8 bits a channel")
            plain = upright.convert("RGB" if channels == 3 else "L")
            # Fits the shorter side to `size` and cuts the longer one down to its middle.
            square = ImageOps.fit(plain, (size, size), method=Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: cannot read {path}: {error}") from error
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
