"""Writes the samples of a run as files for evaluation scripts: an .npz (`--npz`), or a folder of pictures (`--png`)."""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.bulk.shards import Pixels, Shards

__all__ = ["check_png_folder", "write_npz", "write_pngs"]

_THREADS = 8  # how many threads write pictures


def write_npz(
    shards: Shards,
    path: str | os.PathLike[str],
    labels: npt.NDArray[np.int64] | None = None,
    more: Mapping[str, npt.NDArray[Any]] | None = None,
) -> None:
    """Writes all samples to an .npz as arr_0, uint8 (count, height, width, channels).

    Only one shard is in memory at a time. The same samples give the same bytes.

    Args:
        labels: (count,), written as arr_1.
        more: {name: array}, further arrays that are written by their names.

    Examples:
        >>> from pathlib import Path
        >>> from ddpm_ext.bulk.shards import Shards
        >>> shards = Shards(Path("many"), count=6, size=4, shape=(8, 8, 3))
        >>> from ddpm_ext.bulk.run import sample_many
        >>> grey = lambda first, count: torch.full((count, 8, 8, 3), 128, dtype=torch.uint8).numpy()
        >>> result = sample_many(shards, {"seed": 0}, grey, batch_size=4)
        >>> write_npz(shards, "many.npz")
    """
    target = Path(path)
    files.remove_leftovers(target.parent, of=target)
    header = {"descr": "|u1", "fortran_order": False, "shape": (shards.count, *shards.shape)}
    with files.atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as opened:
            np.lib.format.write_array_header_1_0(opened, header)
            for images in shards.images():
                opened.write(images.tobytes())
        for name, array in (({} if labels is None else {"arr_1": labels}) | dict(more or {})).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as opened:
                np.lib.format.write_array(opened, array, allow_pickle=False)


def write_pngs(shards: Shards, folder: Path) -> None:
    """Writes all samples to `folder` as 000000.png, 000001.png and so on (with more digits from 1000001 samples on).

    A new folder appears only when all pictures are written. An existing folder with all pictures is not changed. If the
    folder has only the first pictures, as after a run with fewer samples, the others are added in ascending order.

    Raises:
        ValueError: see check_png_folder; or a shard is damaged.
        MissingExtra: pillow, which writes pictures, is not installed.

    Examples:
        >>> from pathlib import Path
        >>> from ddpm_ext.bulk.shards import Shards
        >>> shards = Shards(Path("many"), count=6, size=4, shape=(8, 8, 3))
        >>> from ddpm_ext.bulk.run import sample_many
        >>> grey = lambda first, count: torch.full((count, 8, 8, 3), 128, dtype=torch.uint8).numpy()
        >>> result = sample_many(shards, {"seed": 0}, grey, batch_size=4)
        >>> write_pngs(shards, Path("pictures"))
    """
    folder = Path(os.path.realpath(folder))
    existing = check_png_folder(shards, folder)
    if existing == shards.count:
        return
    files.remove_leftovers(folder.parent, of=folder)
    image = require("PIL.Image", "writing pictures")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")

    def save(sample: int, pixels: Pixels) -> None:
        image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(temporary / _picture(shards, sample))

    try:
        with files.errors_that_name(folder, temporary), ThreadPoolExecutor(_THREADS) as pool:
            temporary.mkdir()
            # Begins with the shard of the first missing picture.
            for index in range(existing // shards.size, len(shards)):
                list(pool.map(save, shards.ids(index), shards.read(index)))
        if folder.exists():
            for path in sorted(temporary.iterdir()):
                os.replace(path, folder / path.name)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_png_folder(shards: Shards, folder: Path) -> int:
    """The number of pictures in the folder; 0 if the folder does not exist.

    Raises:
        ValueError: the samples have neither 1 nor 3 channels, or the pictures do not have the names of the run's first
            samples.
    """
    if shards.shape[-1] not in (1, 3):
        raise ValueError(f"png: got samples of {shards.shape[-1]} channels, expected 1 or 3")
    names = {path.name for path in folder.glob("*.png")}
    if len(names) > shards.count or names != {_picture(shards, sample) for sample in range(len(names))}:
        expected = f"the {shards.count} from {_picture(shards, 0)} on, or the first of them"
        raise ValueError(f"png: {folder} has {len(names)} pictures, expected {expected}; remove it for new ones")
    return len(names)


def _picture(shards: Shards, sample: int) -> str:
    """The file name of a sample's picture."""
    return f"{sample:0{max(6, len(str(shards.count - 1)))}d}.png"
