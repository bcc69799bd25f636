"""Precomputed latents, an autoencoder's codes of images, as training data."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.models import limits
from ddpm_ext.training.data.dataset import TensorImages
from ddpm_ext.training.data.source import Labels


class Latents(TensorImages):
    """An ImageSource of latents in memory, whose values may be any finite numbers.

    Training does not scale them. They must already be (the autoencoder's latents - `shift_factor`) * `scaling_factor`,
    where an autoencoder without `shift_factor` has 0.

    Args:
        images: (count, channels, height, width) float32, count at least 1.
        labels: the classes, for class-conditional training.

    Raises:
        ValueError: `images` has a wrong dtype or number of dimensions, is empty, or has values that are not finite.
    """

    def _check_values(self, images: Tensor) -> None:
        if not images.isfinite().all():
            raise ValueError("data: the latents have values that are not finite numbers")


def read_latents(path: str | os.PathLike[str]) -> Latents:
    """Reads an .npz of latents: arr_0, floats (count, channels, height, width), and optionally arr_1, their labels.

    Labels are the numbers of classes, whole numbers (count,). The number is also the class's name.

    Raises:
        ValueError: the file can't be read, or its arrays have wrong names, dtypes, shapes or values.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is no archive")
        with archive:
            latents, numbers = archive["arr_0"], archive.get("arr_1")
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} is no .npz with arr_0, the latents ({error})") from error
    if latents.dtype.kind != "f" or latents.ndim != 4 or not len(latents):
        expected = "floats (count, channels, height, width)"
        raise ValueError(f"data: {path} holds {latents.dtype} of shape {latents.shape}, expected {expected}")
    labels = None
    if numbers is not None:
        valid = numbers.dtype.kind in "iu" and numbers.shape == latents.shape[:1]
        if not valid or numbers.min() < 0 or numbers.max() >= limits.CLASSES:
            raise ValueError(
                f"data: {path} holds arr_1, {numbers.dtype} of shape {numbers.shape}, expected whole numbers >= 0 and "
                f"< {limits.CLASSES}, one for each of the latents"
            )
        labels = Labels(torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, range(int(numbers.max()) + 1))))
    return Latents(torch.from_numpy(latents.astype(np.float32)), labels)
