"""Reads the input images of commands, and their classes: a picture, samples in an .npz or .npy, or a folder."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.bulk.shards import MANIFEST, Pixels, Shards
from ddpm_ext.training.data.folder import SUFFIXES, FolderImages, image_paths, image_shape, read_image
from ddpm_ext.training.data.source import Labels
from ddpm_ext.training.run_options import OPTIONS

IMAGES = "a picture, an .npz or .npy of samples, or a folder of pictures, which are cropped and resized as in training"
ARRAYS = (".npz", ".npy")


def read_images(path: str, shape: tuple[int, int, int], name: str) -> Tensor:
    """Reads clean samples, (count, channels, height, width) float32 in [-1, 1].

    Args:
        path: a picture, an .npz or .npy as for read_pixels, or a folder of pictures. Pictures are cropped around their
            middle and resized to `shape`. Samples in an .npz or .npy must already have this shape; if they are floats,
            they are not scaled.
        shape: (channels, height, width) of a sample.
        name: the option's name, with which error messages begin.

    Raises:
        ValueError: there is no such file, it is damaged, empty or of another kind, or its samples have another shape or
            are not finite.
        MissingExtra: pillow, which reads pictures, is not installed.
    """
    source = Path(path)
    if source.suffix.lower() in ARRAYS and not source.is_dir():
        array = _read_array(path, name)
        if array.dtype.kind == "f" and array.ndim == 4:
            return _checked_samples(_float32(array), path, shape, name)
        return _checked_samples(
            _in_unit_range(torch.from_numpy(_as_pixels(array, path, name)).permute(0, 3, 1, 2)), path, shape, name
        )
    if source.suffix.lower() not in SUFFIXES and not source.is_dir():
        kinds = "a picture, an .npz, an .npy or a folder" if source.exists() else "a file or a folder that exists"
        raise ValueError(f"{name}: got {path}, expected {kinds}")
    paths = image_paths(source, name) if source.is_dir() else [_regular_file(source, name)]
    return _in_unit_range(torch.stack([read_image(image, shape, name) for image in paths]))


class Samples:
    """Samples in files, with `shape`, len() and batch() as an ImageSource of training.data has them.

    They come from an .npz or .npy as for read_pixels, from a folder of `ddpm-ext sample --num-images`, or from a folder
    of pictures, which are cropped and resized to the size of the first picture.

    Attributes:
        about: for a folder of `ddpm-ext sample`, the settings with which the samples were drawn; otherwise empty.

    Raises:
        ValueError: there is no such file or folder; it is damaged, empty or of another kind; or it is the folder of a
            training run, or of a `ddpm-ext sample` that has not finished.
        MissingExtra: pillow, which reads pictures, is not installed.
    """

    shape: tuple[int, int, int]

    def __init__(self, path: str, name: str) -> None:
        source, self._name = Path(path), name
        self.about: dict[str, Any] = {}
        self._parts: list[Pixels] = []
        self._pictures: list[Path] = []
        if not source.is_dir():
            if source.suffix.lower() not in ARRAYS or not source.is_file():
                raise ValueError(f"{name}: got {path}, expected a folder, or an .npz or .npy of samples, that exists")
            self._parts = [read_pixels(path, name)]
        elif (source / MANIFEST).is_file():
            shards, self.about = _finished_run(source, name)
            self._parts = list(shards.images())
        elif (source / OPTIONS).is_file():
            expected = f"samples, such as the folder of ddpm-ext sample --model {path} --num-images 10000"
            raise ValueError(f"{name}: {path} is the folder of a training run, expected {expected}")
        else:
            self._pictures = image_paths(source, name)
            self.shape = image_shape(self._pictures[0], name)
        if not self._pictures:
            _, height, width, channels = self._parts[0].shape
            self.shape = (channels, height, width)
        self._ends = np.cumsum([len(part) for part in self._parts])
        if not len(self):
            raise ValueError(f"{name}: {path} holds no samples, expected at least 1")

    def __len__(self) -> int:
        return len(self._pictures) or int(self._ends[-1])

    def batch(self, indices: Tensor) -> Tensor:
        """The samples at `indices`, (batch,) int64: (batch, channels, height, width) float32 in [-1, 1]."""
        return _in_unit_range(torch.stack([self._pixels(index) for index in indices.tolist()]))

    def _pixels(self, index: int) -> Tensor:
        """The pixels of a sample, (channels, height, width) uint8."""
        if self._pictures:
            return read_image(self._pictures[index], self.shape, self._name)
        part = int(np.searchsorted(self._ends, index, "right"))
        return torch.from_numpy(self._parts[part][index - self._ends[part]].transpose(2, 0, 1).copy())


def _finished_run(folder: Path, name: str) -> tuple[Shards, dict[str, Any]]:
    """The samples of a run of `ddpm-ext sample --num-images`, and their settings.

    Raises ValueError if the run's manifest is damaged or samples are missing.
    """
    try:
        settings = files.read_json(folder / MANIFEST)["settings"]
        shards = Shards(folder, settings["num_images"], settings["shard_size"], tuple(settings["shape"]))
        # Counting files is fast. Only if there are enough, missing() tests every shard in the manifest: an untrusted
        # manifest may have a huge number of shards.
        missing = len(shards) - sum(1 for _ in shards.inside.glob("*.npy"))
        missing = missing if missing > 0 else len(shards.missing())
    except (ValueError, TypeError, KeyError, OSError, ArithmeticError) as error:
        raise ValueError(f"{name}: {folder / MANIFEST} is no manifest of samples ({error})") from error
    if missing or not len(shards):
        raise ValueError(f"{name}: {folder} lacks {missing} of {len(shards)} shards; the command that began it goes on")
    return shards, {"settings": settings}


def read_labels(path: str, count: int, name: str) -> Labels | None:
    """The classes of the images that read_images returns, or None if the data has no classes.

    The classes are arr_1 of an .npz, with the numbers as names; or the sub-folders of a folder, if all its pictures are
    in sub-folders.

    Args:
        count: the number of images.

    Raises:
        ValueError: arr_1 is not one whole number from 0 to 2^31 - 1 for each image, or a file or folder can't be read.
    """
    source = Path(path)
    if source.is_dir():
        folders = [image.relative_to(source).parts[:-1] for image in image_paths(source, name)]
        return FolderImages(path, 1).labels() if all(folders) else None
    numbers = _read(path, name, "arr_1") if source.suffix.lower() == ".npz" else None
    if numbers is None:
        return None
    if numbers.dtype.kind not in "iu" or numbers.shape != (count,) or (numbers < 0).any() or (numbers >= 2**31).any():
        expected = f"whole numbers >= 0 of shape ({count},), the images' classes"
        raise ValueError(f"{name}: {path} holds arr_1, {numbers.dtype} of shape {numbers.shape}, expected {expected}")
    return Labels(torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, range(int(numbers.max()) + 1))))


def read_mask(path: str, shape: tuple[int, int, int]) -> Tensor:
    """Reads a picture as a mask: its grey values, (1, 1, height, width) float32 from 0 (black) to 1 (white).

    The picture is cropped and resized like images, but without interpolation between pixels, so that edges stay sharp.

    Raises:
        ValueError: the picture can't be read. MissingExtra: pillow is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"mask: got {path}, expected a picture ending in {' '.join(sorted(SUFFIXES))}")
    return read_image(_regular_file(Path(path), "mask"), (1, *shape[1:]), "mask", smooth=False)[None].float() / 255


def read_noise(path: str, shape: tuple[int, int, int]) -> Tensor:
    """Reads noisy samples that `ddpm-ext invert` wrote, (count, channels, height, width) float32.

    shape: the (channels, height, width) that they must have.

    Raises:
        ValueError: there is no such file, or it holds something else, samples of another shape, or numbers that are not
            finite.
    """
    array = _read_array(path, "noise")
    if array.dtype.kind != "f" or array.ndim != 4:
        expected = "floats (num, channels, height, width), as ddpm-ext invert writes them"
        raise ValueError(f"noise: {path} holds {array.dtype} of shape {array.shape}, expected {expected}")
    return _checked_samples(_float32(array), path, shape, "noise")


def read_pixels(path: str, name: str = "file") -> Pixels:
    """Reads the pixels of samples, (num, height, width, channels) uint8, from arr_0 of an .npz or from an .npy.

    Floats (num, channels, height, width) in [-1, 1] are converted.

    Raises:
        ValueError: the file can't be read, or holds something else.
    """
    array = _read_array(path, name)
    if array.dtype.kind == "f" and array.ndim == 4:
        return plots.to_uint8(_float32(array))
    return _as_pixels(array, path, name)


def _read_array(path: str, name: str) -> np.ndarray[Any, Any]:
    """Reads an .npy, or arr_0 of an .npz."""
    array = _read(path, name, "arr_0")
    assert array is not None
    return array


def _read(path: str, name: str, entry: str) -> np.ndarray[Any, Any] | None:
    """Reads an .npy, or `entry` of an .npz; None if the .npz lacks the entry. An .npz must have arr_0."""
    _regular_file(Path(path), name)
    try:
        contents = np.load(path, allow_pickle=False)
        if isinstance(contents, np.lib.npyio.NpzFile):
            with contents:
                if "arr_0" not in contents:
                    raise ValueError(f"it holds {', '.join(contents) or 'nothing'}, expected arr_0")
                return contents.get(entry)
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        # For a file of another format, numpy's message advises to load it as a pickle, which would be wrong and unsafe.
        reason = "damaged, or of another format" if "pickle" in str(error) else error
        raise ValueError(f"{name}: {path} is no .npz or .npy of samples ({reason})") from error
    return np.asarray(contents)


def _regular_file(path: Path, name: str) -> Path:
    """Returns the path. Raises ValueError if something else than a file is there: opening a pipe could wait forever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{name}: {path} is no regular file")
    return path


def _float32(array: np.ndarray[Any, Any]) -> Tensor:
    """Converts an array to a float32 tensor. Numbers beyond float32's range become infinite, without numpy's warning.

    Infinities are refused by _checked_samples, or become white or black pixels.
    """
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


def _as_pixels(array: np.ndarray[Any, Any], path: str, name: str) -> Pixels:
    """Returns the array. Raises ValueError unless it is uint8 with four dimensions."""
    if array.dtype != np.uint8 or array.ndim != 4:
        expected = "uint8 (num, height, width, channels) or floats (num, channels, height, width)"
        raise ValueError(f"{name}: {path} holds {array.dtype} of shape {array.shape}, expected {expected}")
    return array


def _in_unit_range(pixels: Tensor) -> Tensor:
    """Converts pixels, whose values are 0 to 255, to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def _checked_samples(images: Tensor, path: str, shape: tuple[int, int, int], name: str) -> Tensor:
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
