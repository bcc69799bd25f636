"""Training images in a folder of image files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.optional import require
from ddpm_ext.training.data.source import DamagedImage, Labels, digest

__all__ = ["FolderImages"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
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
        self.root = root
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not self.paths:
            raise ValueError(f"data: no images in {folder}, expected files ending in {' '.join(sorted(_SUFFIXES))}")
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
            pixels = _read(self.paths[index], self.shape)
            if len(self._cache) < self._cache_limit:
                self._cache[index] = pixels
        return pixels


def _read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    from PIL import Image, ImageOps

    channels, size, _ = shape
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith(("I", "F")):
                raise DamagedImage(f"data: {path} has {upright.mode} pixels, expected 8 bits a channel")
            plain = upright.convert("RGB" if channels == 3 else "L")
            # fit() scales the shorter side to `size` and crops the longer one around its middle.
            square = ImageOps.fit(plain, (size, size), method=Image.Resampling.BICUBIC)
    except DamagedImage:
        raise
    except (*_PILLOWS_ERRORS, Image.DecompressionBombError) as error:
        raise DamagedImage(f"data: cannot read {path}: {error}") from error
    return torch.from_numpy(np.array(square)).reshape(size, size, channels).permute(2, 0, 1).contiguous()
