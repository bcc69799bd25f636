"""Images in files, and training images in a folder of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.optional import require
from ddpm_ext.training.data.source import DamagedImage, Labels, digest

__all__ = ["SUFFIXES", "FolderImages", "image_paths", "read_image"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Their formats, whatever the ending says. Pillow knows many more, and starts other programs for some.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
_CACHE_BYTES = 1 << 29
# The exceptions that Pillow's decoders raise for damaged files
_PILLOWS_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


class FolderImages:
    """An ImageSource over the image files in a folder and the folders below it, in the order of their paths.

    Each image is rotated as its EXIF tag says, cropped to the square in its middle, resized and converted. Each process
    keeps up to half a GiB of decoded images in memory.

    Args:
        folder: the folder.
        size: height and width of the images in pixels.
        channels: 1 (grey) or 3 (colour).

    Raises:
        ValueError: the folder is missing or has no images, or `size` or `channels` is out of range.
        MissingExtra: pillow is not installed.
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
        self.root, self.paths = root, image_paths(root)
        self.shape: tuple[int, int, int] = (channels, size, size)
        self._cache: dict[int, Tensor] = {}
        self._cache_limit = _CACHE_BYTES // (channels * size * size)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        pixels = torch.stack([self._pixels(index) for index in indices.tolist()])
        return pixels.float().div_(127.5).sub_(1)

    def labels(self) -> Labels:
        """An image's class is the sub-folder that it lies in, at any depth; classes are in the order of their names.

        Raises:
            ValueError: an image lies in no sub-folder.
        """
        places = [path.relative_to(self.root).parts for path in self.paths]
        outside = next((parts[0] for parts in places if len(parts) == 1), None)
        if outside is not None:
            raise ValueError(f"classes: {self.root} has {outside} outside of its sub-folders, expected one a class")
        names = sorted({parts[0] for parts in places})
        number = {name: index for index, name in enumerate(names)}
        return Labels(torch.tensor([number[parts[0]] for parts in places], device="cpu"), tuple(names))

    def fingerprint(self) -> str:
        """A hash of the shape and of the names and sizes of the files; the folder's own path is not part of it."""
        names = (f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n" for path in self.paths)
        return digest([repr(self.shape).encode(), *(name.encode("utf-8", "surrogateescape") for name in names)])

    def _pixels(self, index: int) -> Tensor:
        """(channels, size, size) uint8"""
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = read_image(self.paths[index], self.shape)
            if len(self._cache) < self._cache_limit:
                self._cache[index] = pixels
        return pixels


def image_paths(folder: Path, name: str = "data") -> list[Path]:
    """The image files in a folder and those below it, in the order of their paths.

    Raises ValueError, whose message begins with `name`, if there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{name}: no images in {folder}, expected files ending in {' '.join(sorted(SUFFIXES))}")
    return paths


def read_image(path: Path, shape: tuple[int, int, int], name: str = "data", *, smooth: bool = True) -> Tensor:
    """Reads an image file as FolderImages does, cropped around its middle and resized to (channels, height, width).

    smooth: whether a pixel of the result is made of several, and not the nearest one.

    Returns:
        uint8, of that shape.

    Raises:
        DamagedImage: the file can't be read, or has more than 8 bits a channel; the message begins with `name`.
        MissingExtra: pillow is not installed.
    """
    image, operations = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")
    channels, height, width = shape
    method = image.Resampling.BICUBIC if smooth else image.Resampling.NEAREST
    try:
        with image.open(path, formats=_FORMATS) as opened:
            upright = operations.exif_transpose(opened)
            if upright.mode.startswith(("I", "F")):
                raise DamagedImage(f"{name}: {path} has {upright.mode} pixels, expected 8 bits a channel")
            plain = upright.convert("RGB" if channels == 3 else "L")
            # fit() crops the longer side around its middle.
            fitted = operations.fit(plain, (width, height), method=method)
    except DamagedImage:
        raise
    except (*_PILLOWS_ERRORS, image.DecompressionBombError) as error:
        raise DamagedImage(f"{name}: cannot read {path}: {error}") from error
    return torch.from_numpy(np.array(fitted)).reshape(height, width, channels).permute(2, 0, 1).contiguous()
