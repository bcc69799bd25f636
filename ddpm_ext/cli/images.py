"""Reads the images that a command is given, and their classes: a picture, samples in an .npz or .npy, or a folder."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.bulk.shards import MANIFEST, Pixels, Shards
from ddpm_ext.training.data.folder import PICTURE_ERRORS, SUFFIXES, FolderImages, image_paths, read_image
from ddpm_ext.training.data.source import Labels
from ddpm_ext.training.run_options import OPTIONS

IMAGES = "a picture, an .npz or .npy of samples, or a folder of pictures, which are cropped and resized as in training"
ARRAYS = (".npz", ".npy")


def read_images(path: str, shape: tuple[int, int, int], name: str) -> Tensor:
    """Clean samples, (count, channels, height, width) float32 in [-1, 1].

    Args:
        path: a picture, an .npz or .npy as read_pixels takes it, or a folder of pictures. Pictures are cropped around
            their middle and resized; samples must have the shape.
        shape: (channels, height, width) of a sample.
        name: of the option, with which messages begin.

    Raises:
        ValueError: there is no such file, it is damaged or of another kind, or its samples have another shape.
    """
    given = Path(path)
    if given.suffix.lower() in ARRAYS and not given.is_dir():
        found = _read_array(path, name)
        if found.dtype.kind == "f" and found.ndim == 4:
            return _of_shape(_float32(found), path, shape, name)
        return _of_shape(_unit(torch.from_numpy(_as_pixels(found, path, name)).permute(0, 3, 1, 2)), path, shape, name)
    if given.suffix.lower() not in SUFFIXES and not given.is_dir():
        what = "a picture, an .npz, an .npy or a folder" if given.exists() else "a file or a folder that exists"
        raise ValueError(f"{name}: got {path}, expected {what}")
    paths = image_paths(given, name) if given.is_dir() else [_regular(given, name)]
    return _unit(torch.stack([read_image(image, shape, name) for image in paths]))


class Samples:
    """Finished samples, read as an ImageSource is: those of an .npz or .npy as read_pixels takes it, of a folder of
    `ddpm-ext sample --num-images`, or of a folder of pictures, which get the first one's size.

    Attributes:
        about: the settings that the folder's samples were drawn with; empty where nothing says them.

    Raises:
        ValueError: there is no such file or folder, or it is damaged, empty or not finished.
    """

    shape: tuple[int, int, int]

    def __init__(self, path: str, name: str) -> None:
        given, self._name = Path(path), name
        self.about: dict[str, Any] = {}
        self._parts: list[Pixels] = []
        self._pictures: list[Path] = []
        if not given.is_dir():
            if given.suffix.lower() not in ARRAYS or not given.is_file():
                raise ValueError(f"{name}: got {path}, expected a folder, or an .npz or .npy of samples, that exists")
            self._parts = [read_pixels(path, name)]
        elif (given / MANIFEST).is_file():
            shards, self.about = _finished(given, name)
            self._parts = list(shards.images())
        elif (given / OPTIONS).is_file():
            expected = f"samples, such as the folder of ddpm-ext sample --model {path} --num-images 10000"
            raise ValueError(f"{name}: {path} is the folder of a training run, expected {expected}")
        else:
            self._pictures = image_paths(given, name)
            self.shape = _picture_shape(self._pictures[0], name)
        if not self._pictures:
            _, height, width, channels = self._parts[0].shape
            self.shape = (channels, height, width)
        self._ends = np.cumsum([len(part) for part in self._parts])
        if not len(self):
            raise ValueError(f"{name}: {path} holds no samples, expected at least 1")

    def __len__(self) -> int:
        return len(self._pictures) or int(self._ends[-1])

    def batch(self, indices: Tensor) -> Tensor:
        """(batch, channels, height, width) float32 in [-1, 1] of the samples at `indices`, (batch,) int64."""
        return _unit(torch.stack([self._pixels(index) for index in indices.tolist()]))

    def _pixels(self, index: int) -> Tensor:
        """(channels, height, width) uint8."""
        if self._pictures:
            return read_image(self._pictures[index], self.shape, self._name)
        part = int(np.searchsorted(self._ends, index, "right"))
        return torch.from_numpy(self._parts[part][index - self._ends[part]].transpose(2, 0, 1).copy())


def _finished(folder: Path, name: str) -> tuple[Shards, dict[str, Any]]:
    """The samples of a run of `ddpm-ext sample --num-images`, and their settings."""
    try:
        settings = files.read_json(folder / MANIFEST)["settings"]
        shards = Shards(folder, settings["num_images"], settings["shard_size"], tuple(settings["shape"]))
        # Files are counted first: the manifest of a stranger may promise any number.
        missing = len(shards) - sum(1 for _ in shards.inside.glob("*.npy"))
        missing = missing if missing > 0 else len(shards.missing())
    except (ValueError, TypeError, KeyError, OSError, ArithmeticError) as error:
        raise ValueError(f"{name}: {folder / MANIFEST} is no manifest of samples ({error})") from error
    if missing or not len(shards):
        raise ValueError(f"{name}: {folder} lacks {missing} of {len(shards)} shards; the command that began it goes on")
    return shards, {"settings": settings}


def _picture_shape(path: Path, name: str) -> tuple[int, int, int]:
    """(channels, height, width) of a picture: 1 channel where it is grey, else 3."""
    try:
        with require("PIL.Image", "reading images").open(path) as opened:
            width, height = opened.size
            return 1 if opened.mode in ("1", "L", "LA") else 3, height, width
    except PICTURE_ERRORS as error:
        raise ValueError(f"{name}: cannot read {path}: {error}") from error


def read_labels(path: str, count: int, name: str) -> Labels | None:
    """The classes of the images that read_images finds: arr_1 of an .npz, whose classes have numbers as names, or the
    sub-folders of a folder in which no picture lies outside of one. None: the data says none.

    Args:
        count: of the images.

    Raises:
        ValueError: arr_1 is not one whole number of at least 0 for each image.
    """
    given = Path(path)
    if given.is_dir():
        folders = [image.relative_to(given).parts[:-1] for image in image_paths(given, name)]
        return FolderImages(path, 1).labels() if all(folders) else None
    found = _read(path, name, "arr_1") if given.suffix.lower() == ".npz" else None
    if found is None:
        return None
    if found.dtype.kind not in "iu" or found.shape != (count,) or (found < 0).any() or (found >= 2**31).any():
        expected = f"whole numbers >= 0 of shape ({count},), the images' classes"
        raise ValueError(f"{name}: {path} holds arr_1, {found.dtype} of shape {found.shape}, expected {expected}")
    return Labels(torch.from_numpy(found.astype(np.int64)), tuple(map(str, range(int(found.max()) + 1))))


def read_mask(path: str, shape: tuple[int, int, int]) -> Tensor:
    """The grey values of a picture, (1, 1, height, width) float32 from 0 (black) to 1 (white).

    The picture is cropped and resized as images are, but no pixel is made of several, so that edges stay sharp.

    Raises:
        ValueError: it can't be read.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"mask: got {path}, expected a picture ending in {' '.join(sorted(SUFFIXES))}")
    return read_image(_regular(Path(path), "mask"), (1, *shape[1:]), "mask", smooth=False)[None].float() / 255


def read_noise(path: str, shape: tuple[int, int, int]) -> Tensor:
    """Noisy samples that `ddpm-ext invert` wrote, (count, channels, height, width) float32.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    found = _read_array(path, "noise")
    if found.dtype.kind != "f" or found.ndim != 4:
        expected = "floats (num, channels, height, width), as ddpm-ext invert writes them"
        raise ValueError(f"noise: {path} holds {found.dtype} of shape {found.shape}, expected {expected}")
    return _of_shape(_float32(found), path, shape, "noise")


def read_pixels(path: str, name: str = "file") -> Pixels:
    """(num, height, width, channels) uint8, from arr_0 of an .npz or from an .npy; floats (num, channels, height,
    width) in [-1, 1] are converted.

    Raises:
        ValueError: the file can't be read, or holds something else.
    """
    found = _read_array(path, name)
    if found.dtype.kind == "f" and found.ndim == 4:
        return plots.to_uint8(_float32(found))
    return _as_pixels(found, path, name)


def _read_array(path: str, name: str) -> np.ndarray[Any, Any]:
    """An .npy, or arr_0 of an .npz."""
    found = _read(path, name, "arr_0")
    assert found is not None
    return found


def _read(path: str, name: str, entry: str) -> np.ndarray[Any, Any] | None:
    """An .npy, or the entry of an .npz; None where that has no such entry besides arr_0, which it must have."""
    _regular(Path(path), name)
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                if "arr_0" not in found:
                    raise ValueError(f"it holds {', '.join(found) or 'nothing'}, expected arr_0")
                return found.get(entry)
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        # numpy takes any other file for a pickle, and advises to load it as one.
        reason = "damaged, or of another format" if "pickle" in str(error) else error
        raise ValueError(f"{name}: {path} is no .npz or .npy of samples ({reason})") from error
    return np.asarray(found)


def _regular(path: Path, name: str) -> Path:
    """The path. Raises ValueError for a pipe or a device: opening one would wait for somebody to write to it."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{name}: {path} is no regular file")
    return path


def _float32(found: np.ndarray[Any, Any]) -> Tensor:
    """As float32, where larger numbers are infinite, without a word: they are refused, or white or black pixels."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(found.astype(np.float32))


def _as_pixels(found: np.ndarray[Any, Any], path: str, name: str) -> Pixels:
    if found.dtype != np.uint8 or found.ndim != 4:
        expected = "uint8 (num, height, width, channels) or floats (num, channels, height, width)"
        raise ValueError(f"{name}: {path} holds {found.dtype} of shape {found.shape}, expected {expected}")
    return found


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1)


def _of_shape(images: Tensor, path: str, shape: tuple[int, int, int], name: str) -> Tensor:
    if not len(images):
        raise ValueError(f"{name}: {path} holds no samples, expected at least 1")
    if images.shape[1:] != shape:
        kind = "x".join(map(str, images.shape[1:]))
        raise ValueError(
            f"{name}: {path} holds {len(images)} samples of {kind}, expected {'x'.join(map(str, shape))} (channels, "
            "height, width), as the model has"
        )
    if not torch.isfinite(images).all():
        raise ValueError(f"{name}: {path} holds numbers that are not finite")
    return images
