"""Many samples into a folder, by one process or several, which may be killed at any time and started again.

A sample is its id: the ids 0 to N - 1 are cut into shards of fixed ranges, whatever the number of ranks and the batch
size, and the ranks take turns at those that are missing. In the folder:

    manifest.json                       what the samples follow from; written first
    shards/000000000-000000511.npy      uint8 (ids, height, width, channels); one that is there is complete
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.base.ranks import Ranks

__all__ = ["SHARD_SIZE", "Shards", "Work", "check_png_folder", "sample_many", "write_npz", "write_pngs"]

SHARD_SIZE = 512
Pixels = npt.NDArray[np.uint8]

_MANIFEST = "manifest.json"
_FORMAT = "ddpm-ext samples 1"
_LOOK = 1.0  # seconds between rank 0's looks into the folder
_PATIENCE = 600.0  # seconds, and ten times what a rank needs for a shard: how long none may come from the others
_VISIBLE_WITHIN = 60.0  # seconds until a new file shows on another machine's mount of the same file system
_THREADS = 8


@dataclass(frozen=True)
class Shards:
    """Samples 0 to `count` - 1 in files of `size`, the last of the rest; `shape`: (height, width, channels)."""

    folder: Path
    count: int
    size: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def ids(self, index: int) -> range:
        return range(index * self.size, min((index + 1) * self.size, self.count))

    def path(self, index: int) -> Path:
        ids = self.ids(index)
        return self.folder / "shards" / f"{ids[0]:09d}-{ids[-1]:09d}.npy"

    def missing(self) -> list[int]:
        return [index for index in range(len(self)) if not self.path(index).exists()]

    def write(self, index: int, images: Pixels) -> None:
        """Raises ValueError if the images are not uint8 (ids, height, width, channels)."""
        self._check(index, images, "draw gave")
        with files.atomic_path(self.path(index)) as beside:
            np.save(beside, images)

    def read(self, index: int) -> Pixels:
        """A shard, memory-mapped. Raises ValueError if it is not what a run writes."""
        path = self.path(index)
        try:
            images = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"out: {path} is damaged ({error}); remove it, and it is drawn again") from error
        self._check(index, images, f"out: {path} holds")
        return images

    def images(self) -> Iterator[Pixels]:
        """All samples in order, a shard at a time, memory-mapped."""
        return map(self.read, range(len(self)))

    def _check(self, index: int, images: Pixels, said: str) -> None:
        expected = (len(self.ids(index)), *self.shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"{said} {images.dtype} of shape {images.shape}, expected uint8 of shape {expected}")


@dataclass(frozen=True)
class Work:
    """What a run did: the samples that were missing at its start, and the seconds until all ranks had drawn them."""

    drawn: int
    seconds: float


def sample_many(
    shards: Shards,
    settings: dict[str, Any],
    draw: Callable[[int, int], Pixels],
    *,
    batch_size: int,
    ranks: Ranks | None = None,
    about: dict[str, Any] | None = None,
    progress: bool = False,
) -> Work:
    """Draws the shards that are missing in the folder; on return all are there.

    Args:
        settings: what the samples follow from, as JSON: one folder has one run's alone.
        draw: draw(first id, count) -> uint8 (count, height, width, channels).
        batch_size: how many at a time, at most a shard.
        ranks: the processes at work, all with the same arguments and the same folder; None: this one alone.
        about: what the manifest says besides.
        progress: whether rank 0 shows a bar of all ranks' samples; it needs tqdm.

    Raises:
        ValueError: the folder has samples of other settings, another run at work, a damaged shard, or is not shared by
            all ranks; draw gave something else.
        ConnectionError: another rank was lost. TimeoutError: another rank writes nothing any more.
    """
    ranks = ranks or Ranks()
    with ExitStack() as until_the_end:
        missing = ranks.share(lambda: _begin(shards, settings, about or {}, until_the_end))
        _check_shared(shards.folder / _MANIFEST)
        first = ranks.rank == 0
        watch = _Watch(shards, missing, bar=progress and first, every=_LOOK if first else 10 * _LOOK)
        until_the_end.callback(watch.close)
        for index in missing[ranks.rank :: ranks.size]:
            ids, batches = shards.ids(index), []
            for start in range(ids.start, ids.stop, batch_size):
                batches.append(draw(start, min(batch_size, ids.stop - start)))
                watch.look(start + len(batches[-1]) - ids.start)
            shards.write(index, np.concatenate(batches))
            watch.own_shard_is_done()
        ranks.wait_for_all(watch.wait)
        return watch.finish()


def _begin(shards: Shards, settings: dict[str, Any], about: dict[str, Any], until_the_end: ExitStack) -> list[int]:
    """Rank 0's part: manifest, lock, and which shards are missing."""
    manifest, inside = shards.folder / _MANIFEST, shards.folder / "shards"
    settings = {**settings, "num_images": shards.count, "shard_size": shards.size, "shape": list(shards.shape)}
    if shards.folder.exists() and not shards.folder.is_dir():
        raise ValueError(f"out: {shards.folder} is a file, expected a folder")
    if manifest.exists():
        _check_same(manifest, settings)
    elif inside.exists():
        raise ValueError(f"out: {shards.folder} has shards but no {_MANIFEST}, expected both or neither")
    else:
        files.check_writable(manifest)
        files.write_json(manifest, {"format": _FORMAT, "settings": settings, "about": about})
    until_the_end.enter_context(files.lock(manifest))
    inside.mkdir(exist_ok=True)
    for leftover in inside.glob(".*.npy"):  # of a writer that was killed
        leftover.unlink()
    missing = shards.missing()
    for index in set(range(len(shards))).difference(missing):
        shards.read(index)
    return missing


def _check_same(manifest: Path, settings: dict[str, Any]) -> None:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        there = found["settings"] if found["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {manifest} is no manifest of samples") from error
    if not isinstance(there, dict):
        raise ValueError(f"out: {manifest} has format {found['format']!r}, expected {_FORMAT!r}")
    names = [name for name in {**settings, **there} if settings.get(name) != there.get(name)]
    if names:
        differ = "; ".join(f"{name} is {there.get(name)} there and {settings.get(name)} here" for name in names)
        raise ValueError(f"out: {manifest.parent} has samples of other settings: {differ}; expected another folder")


def _check_shared(path: Path) -> None:
    """Waits for what another rank wrote to show here; raises ValueError if it doesn't."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"out: another rank wrote {path}, but here it is not; expected a folder that all share")
        time.sleep(0.1)


class _Watch:
    """A rank's view of the folder: whether the others are still at work, the time, and rank 0's bar."""

    def __init__(self, shards: Shards, missing: list[int], *, bar: bool, every: float) -> None:
        self.shards, self.every = shards, every
        self.sizes = {shards.path(index).name: len(shards.ids(index)) for index in missing}
        self.wanted = sum(self.sizes.values())
        self.start = self.own_start = self.news = self.looked = time.monotonic()
        self.left, self.slowest = len(missing), 0.0
        self.bar = None
        if bar:
            tqdm = require("tqdm", "the progress bar").tqdm
            self.bar = tqdm(total=shards.count, initial=shards.count - self.wanted, desc="samples", unit="image")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def look(self, own: int = 0, *, now: bool = False) -> None:
        """Counts the shards that are there, if it is time to; `own`: samples of the own shard under way."""
        if not now and time.monotonic() - self.looked < self.every:
            return
        self.looked = time.monotonic()
        names = self.sizes.keys() - os.listdir(self.shards.folder / "shards")
        if len(names) != self.left:
            self.left, self.news = len(names), self.looked
        if self.bar is not None:
            self.bar.update(self.shards.count - sum(self.sizes[name] for name in names) + own - self.bar.n)

    def own_shard_is_done(self) -> None:
        now = time.monotonic()
        self.slowest, self.own_start = max(self.slowest, now - self.own_start), now

    def wait(self) -> None:
        """While this rank has nothing more to draw. One that had nothing at all knows no measure."""
        self.look()
        patience = _PATIENCE + 10 * self.slowest if self.slowest else math.inf
        if time.monotonic() - self.news > patience:
            raise TimeoutError(
                f"no shard has come for {patience:.0f} s, and {self.left} are missing: a rank is stuck; "
                "what was finished is kept: run the same command again to go on"
            )

    def finish(self) -> Work:
        for name in self.sizes:
            _check_shared(self.shards.folder / "shards" / name)
        self.look(now=True)
        return Work(self.wanted, time.monotonic() - self.start)


# -------------------------------------------------------------------------------------------------------- the end


def write_npz(shards: Shards, path: str | os.PathLike[str]) -> None:
    """All samples as arr_0, uint8 (count, height, width, channels), in an .npz; a shard in memory at a time.

    The same samples give the same file, to the bit.
    """
    target = Path(path)
    _remove_leftovers(target)
    header = {"descr": "|u1", "fortran_order": False, "shape": (shards.count, *shards.shape)}
    with (
        files.atomic_path(target) as beside,
        zipfile.ZipFile(beside, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as opened,
    ):
        np.lib.format.write_array_header_1_0(opened, header)
        for images in shards.images():
            opened.write(images.tobytes())


def write_pngs(shards: Shards, folder: Path) -> None:
    """All samples as 000000.png and so on; the folder appears when all are there, and one that is there stays.

    Raises ValueError as check_png_folder.
    """
    check_png_folder(shards, folder)
    if folder.exists():
        return
    _remove_leftovers(folder)
    image = require("PIL.Image", "writing pictures")
    digits = max(6, len(str(shards.count - 1)))
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    beside.mkdir()

    def save(sample: int, pixels: Pixels) -> None:
        image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(beside / f"{sample:0{digits}d}.png")

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for index, images in enumerate(shards.images()):
                list(pool.map(save, shards.ids(index), images))
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_png_folder(shards: Shards, folder: Path) -> None:
    """Raises ValueError if the channels are not 1 or 3, or the folder exists with another number of pictures."""
    if shards.shape[-1] not in (1, 3):
        raise ValueError(f"png: got samples of {shards.shape[-1]} channels, expected 1 or 3")
    if folder.exists():
        found = sum(1 for _ in folder.glob("*.png"))
        if found != shards.count:
            raise ValueError(f"png: {folder} has {found} pictures, expected {shards.count}; remove it for new ones")


def _remove_leftovers(target: Path) -> None:
    """What a writer left beside `target` when it was killed: see files.atomic_path."""
    for leftover in target.parent.glob(f".{escape(target.stem)}.????????{escape(target.suffix)}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
