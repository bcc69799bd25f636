"""Image files, and training images in a folder of image files."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.optional import require
from ddpm_ext.training.data.source import DamagedImage, Labels, digest

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# The accepted formats; a file's ending need not match. Pillow reads many more, and starts other programs for some.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
_CACHE_BYTES = 1 << 29  # the most bytes of decoded images that a FolderImages stores: 512 MiB
# The exceptions that Pillow's decoders raise for damaged files.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


class FolderImages:
    """An ImageSource over the image files in a folder and the folders below it, in the order of their paths.

    Each image is rotated by its EXIF tag, converted to grey or colour, cropped to a square, and resized. Each process
    keeps up to half a GiB of decoded images in memory.

    Args:
        folder: the folder.
        size: height and width of the images in pixels. With None, all files must be squares of one size, which is used.
        channels: 1 (grey) or 3 (colour).
        random_crop: 0 takes the square in the middle. Otherwise the square is at a random position, and its side is a
            random share of the image's shorter side, from random_crop to 1.

    Raises:
        ValueError: the folder is missing or has no images, `size`, `channels` or `random_crop` is out of range, or
            `size` is None and the files are no squares, have several sizes, or can't be read.
        MissingExtra: pillow is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], size: int | None = None, channels: int = 3, random_crop: float = 0.0
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"image size: got {size}, expected at least 1")
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 1 (grey) or 3 (colour)")
        if not 0 <= random_crop <= 1:
            raise ValueError(f"random_crop: got {random_crop}, expected in [0, 1]")
        require("PIL.Image", "reading images")
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data: no such folder: {folder}")
        self.root, self.paths = root, image_paths(root)
        side = common_side(self.paths) if size is None else size
        self.shape: tuple[int, int, int] = (channels, side, side)
        self.random_crop, self.seeded = random_crop, bool(random_crop)
        self._cache: dict[int, Tensor] = {}
        self._cache_left = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        images = [self._pixels(index) for index in indices.tolist()]
        if self.random_crop:
            crops = [random_square(seed, self.random_crop) for seed in seeds or indices.tolist()]
            images = [cropped(image, self.shape[1], *crop) for image, crop in zip(images, crops, strict=True)]
        return torch.stack(images).float().div_(127.5).sub_(1)

    def labels(self) -> Labels:
        """An image's class is the sub-folder, directly below the root folder, that holds it at any depth.

        Classes are in the order of their names.

        Raises:
            ValueError: an image lies in no sub-folder.
        """
        relative_paths = [path.relative_to(self.root).parts for path in self.paths]
        outside = next((parts[0] for parts in relative_paths if len(parts) == 1), None)
        if outside is not None:
            raise ValueError(f"classes: {self.root} has {outside} outside of its sub-folders, expected one a class")
        names = sorted({parts[0] for parts in relative_paths})
        number_of = {name: index for index, name in enumerate(names)}
        return Labels(torch.tensor([number_of[parts[0]] for parts in relative_paths], device="cpu"), tuple(names))

    def fingerprint(self) -> str:
        """A hash of the images' shape, and of the files' sizes and paths relative to the folder."""
        names = (f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n" for path in self.paths)
        return digest([repr(self.shape).encode(), *(name.encode("utf-8", "surrogateescape") for name in names)])

    def _pixels(self, index: int) -> Tensor:
        """The pixels of an image, uint8: (channels, size, size), or, for random crops, the whole image.

        A large whole image is reduced, to a size at which its smallest random crops have at least `size` pixels a side.
        """
        pixels = self._cache.get(index)
        if pixels is None:
            if self.random_crop:
                pixels = read_whole(self.paths[index], self.shape[0], math.ceil(self.shape[1] / self.random_crop))
            else:
                pixels = read_image(self.paths[index], self.shape)
            if pixels.numel() <= self._cache_left:
                self._cache[index] = pixels
                self._cache_left -= pixels.numel()
        return pixels


def image_paths(folder: Path, name: str = "data") -> list[Path]:
    """The image files in a folder and the folders below it, in the order of their paths.

    Hidden files and folders are left out: a Mac's `._photo.png` holds no image, and .ipynb_checkpoints has copies.
    Raises ValueError, with a message that begins with `name`, if there are no images.
    """
    with_suffix = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    visible = (path for path in with_suffix if all(part[0] != "." for part in path.relative_to(folder).parts))
    paths = sorted(path for path in visible if path.is_file())
    if not paths:
        raise ValueError(f"{name}: no images in {folder}, expected files ending in {' '.join(sorted(SUFFIXES))}")
    return paths


def common_side(paths: list[Path]) -> int:
    """The side of images that are all squares of one size. Only the headers of the files are read.

    Files that can't be read are skipped: reading them as images raises the error later.

    Raises:
        ValueError: the images have several sizes, or are no squares, or no file can be read.
    """
    image = require("PIL.Image", "reading images")
    side = None
    for path in paths:
        try:
            with image.open(path, formats=_FORMATS) as opened:
                width, height = opened.size
        except (*PICTURE_ERRORS, image.DecompressionBombError):
            continue
        side = side or width
        if not width == height == side:
            raise ValueError(
                f"image size: got none, and {path} is {width} by {height} pixels, expected a size, or images that all "
                f"are {side} by {side}, since the first is {side} wide"
            )
    if side is None:
        raise ValueError(f"image size: got none, and no image can be read, not even {paths[0]}; expected a size")
    return side


def read_image(path: Path, shape: tuple[int, int, int], name: str = "data", *, smooth: bool = True) -> Tensor:
    """Reads an image file, cropped around its middle and resized to `shape`, (channels, height, width).

    smooth: whether resizing interpolates between pixels. If False, it takes the nearest pixel.

    Returns:
        uint8, of the shape `shape`.

    Raises:
        DamagedImage: the file can't be read, or has more than 8 bits a channel; the message begins with `name`.
        MissingExtra: pillow is not installed.
    """
    image, operations = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")
    channels, height, width = shape
    method = image.Resampling.BICUBIC if smooth else image.Resampling.NEAREST
    # fit() crops the longer side around its middle.
    return _decoded(path, channels, name, lambda picture: operations.fit(picture, (width, height), method=method))


def image_shape(path: Path, name: str) -> tuple[int, int, int]:
    """(channels, height, width) of an image file, as read_image takes it: 1 channel if it is grey or black and white.

    Raises:
        DamagedImage, MissingExtra: see read_image.
    """
    with _upright(path, name) as image:
        return 1 if image.mode in ("1", "L", "LA") else 3, image.height, image.width


def read_whole(path: Path, channels: int, shorter: int) -> Tensor:
    """Reads an image file without a crop. If its shorter side is longer than `shorter` pixels, the image is reduced.

    Returns:
        (channels, height, width) uint8.

    Raises:
        DamagedImage: the file can't be read, or has more than 8 bits a channel.
    """
    method = require("PIL.Image", "reading images").Resampling.BICUBIC

    def reduce(picture: Any) -> Any:
        scale = shorter / min(picture.size)
        return (
            picture
            if scale >= 1
            else picture.resize([max(shorter, round(scale * side)) for side in picture.size], method)
        )

    return _decoded(path, channels, "data", reduce)


def random_square(seed: int, smallest: float) -> tuple[float, float, float]:
    """Draws a random square in an image.

    Returns:
        The square's side as a share of the image's shorter side, from `smallest` to 1. Then the share of the vertical
        space outside the square that is above it, and the share of the horizontal space that is left of it, in [0, 1).
    """
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu").tolist()
    return smallest + (1 - smallest) * uniform[0], uniform[1], uniform[2]


def cropped(pixels: Tensor, size: int, share: float, top: float, left: float) -> Tensor:
    """Crops an image to a square and resizes it.

    Args:
        pixels: (channels, height, width) uint8.
        size: height and width of the result.
        share, top, left: the square, as random_square returns it.

    Returns:
        (channels, size, size) uint8.
    """
    image = require("PIL.Image", "reading images")
    channels, height, width = pixels.shape
    side = share * min(height, width)
    x, y = left * (width - side), top * (height - side)
    whole = pixels.permute(1, 2, 0).numpy()
    picture = image.fromarray(whole[..., 0] if channels == 1 else np.ascontiguousarray(whole))
    box = (x, y, min(x + side, width), min(y + side, height))
    return _tensor(picture.resize((size, size), image.Resampling.BICUBIC, box=box), channels)


def _decoded(path: Path, channels: int, name: str, resize: Callable[[Any], Any]) -> Tensor:
    """Reads an image file, rotates it by its EXIF tag and applies `resize`. Returns (channels, height, width) uint8."""
    with _upright(path, name) as image:
        return _tensor(resize(image.convert("RGB" if channels == 3 else "L")), channels)


@contextmanager
def _upright(path: Path, name: str) -> Iterator[Any]:
    """Opens an image file, rotated by its EXIF tag. Errors in the block become DamagedImage, which names the file."""
    image, operations = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")
    try:
        with image.open(path, formats=_FORMATS) as opened:
            upright = operations.exif_transpose(opened)
            if upright.mode.startswith(("I", "F")):
                raise DamagedImage(f"{name}: {path} has {upright.mode} pixels, expected 8 bits a channel")
            yield upright
    except DamagedImage:
        raise
    except (*PICTURE_ERRORS, image.DecompressionBombError) as error:
        raise DamagedImage(f"{name}: cannot read {path}: {error}") from error


def _tensor(image: Any, channels: int) -> Tensor:
    """An image of Pillow as a tensor, (channels, height, width) uint8."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(image.height, image.width, channels).permute(2, 0, 1).contiguous()
