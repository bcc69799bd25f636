"""Makes an ImageSource of a caller's data: a name, a folder, a tensor or a torch Dataset."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.optional import require
from ddpm_ext.training.data.dataset import DatasetImages, TensorImages
from ddpm_ext.training.data.folder import FolderImages
from ddpm_ext.training.data.latents import read_latents
from ddpm_ext.training.data.shapes import Shapes
from ddpm_ext.training.data.source import ImageSource, Labels

_PARTS = ("train", "heldout", "all")
# Every seventh image is held out, which makes 18 to 35 images of each digit.
_HELD_OUT_EVERY = 7


def load_images(
    source: str, size: int | None = None, channels: int | None = None, random_crop: float = 0.0
) -> ImageSource:
    """Opens images by name.

    Args:
        source: "digits" (the training part of scikit-learn's digits), "shapes" (coloured shapes), the path of a folder
            of images, or the path of an .npz of latents (see read_latents).
        size: height and width in pixels. With None, shapes have 16, and a folder's images must all be squares of the
            same size. Digits are 8 by 8. For latents it must be None.
        channels: 1 (grey) or 3 (colour). None means 1 for digits, 3 for shapes and a folder. For latents it must be
            None.
        random_crop: only for a folder; see FolderImages.

    Raises:
        ValueError: `size`, `channels` or `random_crop` doesn't fit, the folder is missing or has no images, or the
            latents can't be read.
        MissingExtra: scikit-learn, for digits, or pillow, for a folder, is not installed.

    Examples:
        >>> load_images("shapes", size=32).shape
        (3, 32, 32)
    """
    if random_crop and source in ("digits", "shapes"):
        raise ValueError(f"random_crop: got {random_crop} for {source}, expected a folder of images")
    if source.lower().endswith(".npz"):
        for name, value in (("image size", size), ("channels", channels), ("random_crop", random_crop)):
            if value:
                raise ValueError(f"{name}: got {value} for latents, expected none: {source} says their shape")
        return read_latents(source)
    if source == "shapes":
        if channels not in (None, 3):
            raise ValueError(f"channels: got {channels}, but shapes have 3")
        return Shapes() if size is None else Shapes(size)
    if source != "digits":
        if not os.path.isdir(source):
            raise ValueError(f"data: no such folder: {source}; expected one, an .npz of latents, 'digits' or 'shapes'")
        return FolderImages(source, size, 3 if channels is None else channels, random_crop)
    if size not in (None, 8):
        raise ValueError(f"image size: got {size}, but digits are 8 by 8 pixels")
    if channels not in (None, 1):
        raise ValueError(f"channels: got {channels}, but digits have 1")
    images, numbers = digits("train")
    return TensorImages(images, Labels(numbers, tuple("0123456789")))


def as_images(data: Any, size: int | None = None, channels: int | None = None, random_crop: float = 0.0) -> ImageSource:
    """Makes an ImageSource of `data`.

    Args:
        data: a name or path for load_images, a tensor, a map-style torch Dataset, or an ImageSource, which is returned
            unchanged.
        size, channels, random_crop: only for a name or path; see load_images.

    Raises:
        TypeError: `data` has a different type; see also DatasetImages.
        ValueError: see load_images, TensorImages and DatasetImages; or random_crop is set, and `data` is no folder.
    """
    if isinstance(data, str | os.PathLike):
        return load_images(os.fspath(data), size, channels, random_crop)
    if random_crop:
        raise ValueError(
            f"random_crop: got {random_crop} for a {type(data).__name__}, expected a folder of images; a Dataset crops "
            "by its own transforms"
        )
    if isinstance(data, Tensor):
        return TensorImages(data)
    if callable(getattr(data, "batch", None)) and callable(getattr(data, "fingerprint", None)):
        return data
    if not hasattr(data, "__getitem__"):
        kind = type(data).__name__
        raise TypeError(
            f"data is a {kind}, expected 'digits', 'shapes', a folder, a tensor or a map-style torch Dataset"
        )
    return DatasetImages(data)


def digits(part: str = "all") -> tuple[Tensor, Tensor]:
    """Loads scikit-learn's handwritten digits: 1,797 grey images of 8 by 8 pixels, in the order of its `load_digits`.

    Args:
        part: "train" (1,541 images), "heldout" (256, every seventh) or "all".

    Returns:
        Images (count, 1, 8, 8) float32 in [-1, 1], and labels (count,) int64 from 0 to 9.

    Raises:
        ValueError: `part` is none of these names.
        MissingExtra: scikit-learn is not installed.

    Examples:
        >>> from ddpm_ext.training.data import digits
        >>> images, labels = digits("heldout")  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        torch.Size([256, 1, 8, 8])
    """
    if part not in _PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(_PARTS)}")
    loaded = require("sklearn.datasets", "the digits data set", in_demo=False).load_digits()
    images = torch.from_numpy(loaded.images).float().div_(8).sub_(1).unsqueeze(1)  # pixels are 0 to 16
    labels = torch.from_numpy(loaded.target).long()
    held_out = torch.arange(len(labels), device="cpu") % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    chosen = {"train": ~held_out, "heldout": held_out, "all": torch.ones_like(held_out)}[part]
    return images[chosen], labels[chosen]
