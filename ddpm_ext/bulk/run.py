"""Draws the samples that are missing in a folder, by one process or several.

A run that was killed continues where it stopped, and a run with a larger number of samples adds the missing ones. The
ranks take turns at the missing shards: with R ranks, rank r draws every R-th of them, starting with the r-th.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.base.ranks import KEPT, Ranks
from ddpm_ext.bulk.shards import MANIFEST, Pixels, Shards

_log = logging.getLogger(__name__)
_FORMAT = "ddpm-ext samples 1"
_INTERVAL = 1.0  # seconds between two looks of rank 0 into the folder
# A waiting rank gives up if no shard is written for this many seconds plus ten times the duration of its slowest one.
_PATIENCE = 600.0
_STOPPED = 60.0  # If a waiting rank did not run for this many seconds, all ranks were stopped, as by Ctrl-Z.
_VISIBLE_WITHIN = 60.0  # the limit in seconds until a new file is visible on another machine's mount


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        drawn: the number of samples that were missing at the start of the run.
        seconds: the time until all ranks had drawn them.
        not_finite: the number of samples in the folder that had NaN or infinities.
    """

    drawn: int
    seconds: float
    not_finite: int = 0


def sample_many(
    shards: Shards,
    settings: dict[str, Any],
    draw: Callable[[int, int], Pixels],
    *,
    batch_size: int,
    ranks: Ranks | None = None,
    about: dict[str, Any] | None = None,
    progress: bool = False,
    not_finite: Container[int] = (),
) -> Result:
    """Draws the shards that are missing in the folder. When it returns, the folder has all of them.

    A folder with fewer samples keeps its shards, except that a last shard that was not full is drawn again.

    Args:
        settings: the settings that determine the samples, as JSON. A folder has samples of one set of settings only.
        draw: draw(first sample, count) -> uint8 (count, height, width, channels).
        batch_size: the number of samples to draw at a time. A batch never goes past the end of a shard.
        ranks: the processes of the run, all with the same arguments and the same folder. None means this process alone.
        about: further entries of the manifest, which later runs do not compare.
        progress: whether rank 0 shows a progress bar on a terminal, over the samples of all ranks. It needs tqdm.
        not_finite: the numbers of samples in which `draw` has found NaN or infinities. It is read after each shard, and
            the count is written to the manifest.

    Raises:
        ValueError: the folder has samples of other settings, more samples or a damaged shard, is in use by another run,
            or is not shared by the ranks; or draw returned another array.
        OSError: a shard cannot be written, as on a full disk. Finished shards stay.
        ConnectionError: another rank was lost.
        TimeoutError: another rank has stopped writing shards.

    Examples:
        >>> from pathlib import Path
        >>> from ddpm_ext.bulk.shards import Shards
        >>> shards = Shards(Path("many"), count=6, size=4, shape=(8, 8, 3))
        >>> grey = lambda first, count: torch.full((count, 8, 8, 3), 128, dtype=torch.uint8).numpy()
        >>> result = sample_many(shards, {"seed": 0}, grey, batch_size=4)
        >>> result.drawn
        6
    """
    ranks = ranks or Ranks()
    with ExitStack() as until_the_end:
        missing = ranks.share(lambda: _begin(shards, settings, about or {}, until_the_end))
        _wait_until_visible(shards.manifest)
        first = ranks.rank == 0
        watch = _Watch(shards, missing, bar=progress and first, every=_INTERVAL if first else 10 * _INTERVAL)
        until_the_end.callback(watch.close)
        for index in missing[ranks.rank :: ranks.size]:
            ids, batches = shards.ids(index), []
            for start in range(ids.start, ids.stop, batch_size):
                batches.append(draw(start, min(batch_size, ids.stop - start)))
                watch.look(start + len(batches[-1]) - ids.start)
            with files.errors_name("out", shards.path(index), f"; {KEPT}"):
                shards.write(index, np.concatenate(batches), [number for number in ids if number in not_finite])
            watch.own_shard_is_done()
        ranks.wait_for_all(watch.wait)
        result = watch.finish()
        return replace(result, not_finite=ranks.share(lambda: _count_not_finite(shards)))


def _begin(shards: Shards, settings: dict[str, Any], about: dict[str, Any], until_the_end: ExitStack) -> list[int]:
    """Rank 0's preparation: writes or compares the manifest, locks the folder, and returns the missing shards."""
    settings = {**settings, "num_images": shards.count, "shard_size": shards.size, "shape": shards.shape}
    settings = json.loads(json.dumps(settings))  # lists in place of tuples, like those of the manifest
    if shards.folder.exists() and not shards.folder.is_dir():
        raise ValueError(f"out: {shards.folder} is a file, expected a folder")
    if shards.manifest.exists():
        until_the_end.enter_context(files.lock(shards.manifest))
        manifest = _check_same(shards.manifest, settings)
        if manifest["settings"]["num_images"] < shards.count:
            files.check_writable(shards.manifest)
            before = replace(shards, count=manifest["settings"]["num_images"])
            if before.path(len(before) - 1) != shards.path(len(before) - 1):
                # Removed before the new manifest is written, so that a killed run leaves a valid smaller folder.
                before.remove(len(before) - 1)
            files.write_json(shards.manifest, {**manifest, "settings": settings})
            until_the_end.enter_context(files.lock(shards.manifest))  # the manifest is a new file, without a lock
    elif shards.inside.exists():
        raise ValueError(f"out: {shards.folder} has shards but no {MANIFEST}, expected both or neither")
    else:
        files.check_writable(shards.manifest)
        files.write_json(shards.manifest, {"format": _FORMAT, "settings": settings, "about": about})
        until_the_end.enter_context(files.lock(shards.manifest))
    shards.inside.mkdir(exist_ok=True)
    files.remove_leftovers(shards.folder, of=shards.manifest)
    files.remove_leftovers(shards.inside)
    missing = shards.missing()
    if len(missing) < len(shards):
        _log.info("%s: goes on where %d of %d shards are missing", shards.folder, len(missing), len(shards))
    for index in set(range(len(shards))).difference(missing):
        shards.read(index)
    return missing


def _count_not_finite(shards: Shards) -> int:
    """Called on rank 0: counts the samples that were not finite, and writes their number to the manifest."""
    manifest, count = files.read_json(shards.manifest), len(shards.not_finite())
    if manifest.get("not_finite") != count:
        files.write_json(shards.manifest, {**manifest, "not_finite": count})
    return count


def _check_same(manifest: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest. Raises ValueError, naming what differs, if the folder has other settings, or more samples."""
    try:
        content = files.read_json(manifest)
        form, stored = content["format"], content["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {manifest} is no manifest of samples") from error
    if form != _FORMAT:
        raise ValueError(f"out: {manifest} has format {form!r}, expected {_FORMAT!r}")
    if not isinstance(stored, dict):
        raise ValueError(f"out: {manifest} has settings {stored!r}, expected an object")
    names = [name for name in {**settings, **stored} if settings.get(name) != stored.get(name)]
    count, target = stored.get("num_images"), settings["num_images"]
    if isinstance(count, int) and 0 < count < target:
        names.remove("num_images")
    if names == ["num_images"]:
        raise ValueError(
            f"out: {manifest.parent} has {count} samples, of which none is removed; got num_images {target}, expected "
            "at least as many, or another folder"
        )
    if names:
        differ = "; ".join(f"{name} is {stored.get(name)} there and {settings.get(name)} here" for name in names)
        raise ValueError(f"out: {manifest.parent} has samples of other settings: {differ}; expected another folder")
    return dict(content)


def _wait_until_visible(path: Path) -> None:
    """Waits until a file that another rank wrote is visible on this machine. Raises ValueError if it doesn't appear."""
    deadline, late = time.monotonic() + _VISIBLE_WITHIN, False
    while not path.exists():
        if late:
            raise ValueError(
                f"out: another rank wrote {path}, but here it is not; expected a folder that all share, and that no "
                "other program removes files from"
            )
        late = time.monotonic() > deadline  # the loop looks once more: this process may have been stopped meanwhile
        time.sleep(0.1)


class _Watch:
    """One rank's view of the folder: which shards are still missing, and whether the other ranks make progress.

    Args:
        bar: whether to show a progress bar.
        every: seconds between two looks into the folder.
    """

    def __init__(self, shards: Shards, missing: list[int], *, bar: bool, every: float) -> None:
        self.shards, self.every = shards, every
        self.sizes = {shards.path(index).name: len(shards.ids(index)) for index in missing}
        self.missing_samples = sum(self.sizes.values())
        self.start = self.own_start = self.last_change = self.last_look = time.monotonic()
        self.last_wait = math.inf
        self.remaining = len(missing)
        self.slowest = 0.0  # the longest duration of a shard of this rank, in seconds
        self.bar = None
        if bar:
            tqdm = require("tqdm", "the progress bar").tqdm
            existing = shards.count - self.missing_samples
            self.bar = tqdm(total=shards.count, initial=existing, desc="samples", unit="image", disable=None)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def look(self, drawn: int = 0, *, now: bool = False) -> None:
        """Counts the shards in the folder, if the last look is long enough ago or with `now`.

        Args:
            drawn: the number of samples of this rank's current shard that are drawn.
        """
        if not now and time.monotonic() - self.last_look < self.every:
            return
        self.last_look = time.monotonic()
        names = self.sizes.keys() - os.listdir(self.shards.inside)
        if len(names) != self.remaining:
            self.remaining, self.last_change = len(names), self.last_look
        if self.bar is not None:
            self.bar.update(self.shards.count - sum(self.sizes[name] for name in names) + drawn - self.bar.n)

    def own_shard_is_done(self) -> None:
        now = time.monotonic()
        self.slowest, self.own_start = max(self.slowest, now - self.own_start), now

    def wait(self) -> None:
        """Called repeatedly while this rank waits for the others.

        Raises TimeoutError if the others write no shard for too long. A rank that drew no shard cannot estimate the
        duration of one, and waits without a limit.
        """
        self.look()
        now = time.monotonic()
        if now - self.last_wait > _STOPPED:
            self.last_change = now
        self.last_wait = now
        patience = _PATIENCE + 10 * self.slowest if self.slowest else math.inf
        if now - self.last_change > patience:
            raise TimeoutError(
                f"no shard has come for {patience:.0f} s, and {self.remaining} are missing: a rank is stuck; {KEPT}"
            )

    def finish(self) -> Result:
        for name in self.sizes:
            _wait_until_visible(self.shards.inside / name)
        self.look(now=True)
        return Result(self.missing_samples, time.monotonic() - self.start)
