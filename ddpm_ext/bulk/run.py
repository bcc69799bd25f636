"""Draws the samples that are missing in a folder, by one process or several.

A run that was killed continues where it stopped, and a run with more samples than the folder has adds the missing ones.
With R ranks, rank r draws every R-th shard of the list of missing shards, from number r of the list on.
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
_INTERVAL = 1.0  # seconds between two times that rank 0 lists the folder; other ranks wait ten times as long
# A waiting rank gives up if no shard is written for this many seconds, plus ten times the longest duration of a shard
# that it drew itself. A rank that drew none never gives up.
_PATIENCE = 600.0
# If a waiting rank did not run for this many seconds, it was stopped, as by Ctrl-Z, and probably the other ranks, too.
# So its patience begins anew.
_STOPPED = 60.0
_VISIBLE_WITHIN = 60.0  # the limit in seconds until a new file is visible on another machine's mount


@dataclass(frozen=True)
class Result:
    """Statistics of a run.

    Attributes:
        drawn: the number of samples that were missing at the start of the run, and were drawn.
        seconds: the time until all ranks had drawn their samples.
        not_finite: the number of samples in the folder in which NaN or infinities became pixels.
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
    """Draws the shards that are missing in the folder. When this function returns, the folder has all shards.

    If the folder has fewer samples, its full shards are not drawn again. Its last shard is drawn again if it was not
    full.

    Args:
        settings: the settings that determine the samples, as JSON. All samples in a folder have the same settings.
        draw: draw(first sample, count) -> uint8 (count, height, width, channels).
        batch_size: the most samples to draw at a time. A batch ends at the end of a shard.
        ranks: the processes of the run, all with the same arguments and the same folder. None means only this process.
        about: the entry "about" of a new manifest, as JSON. A later run may pass other values, which are not written.
        progress: whether rank 0 shows a progress bar on a terminal, over the samples of all ranks. It needs tqdm.
        not_finite: the numbers of samples with NaN or infinities, a container to which `draw` adds them. It is read
            after each shard, and the manifest gets the count of all shards.

    Raises:
        ValueError: the folder has samples of other settings, more samples or a damaged shard, is in use by another run,
            or is not shared by the ranks; or draw returned another array.
        OSError: a shard cannot be written, as on a full disk. Finished shards stay.
        ConnectionError: another rank was lost.
        TimeoutError: another rank has stopped writing shards.
        SystemExit: on the other ranks, if rank 0 raises an error about the folder.

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
        is_first = ranks.rank == 0
        watch = _Watch(shards, missing, bar=progress and is_first, every=_INTERVAL if is_first else 10 * _INTERVAL)
        until_the_end.callback(watch.close)
        for index in missing[ranks.rank :: ranks.size]:
            ids, batches = shards.ids(index), []
            for start in range(ids.start, ids.stop, batch_size):
                batches.append(draw(start, min(batch_size, ids.stop - start)))
                watch.look(start + len(batches[-1]) - ids.start)
            with files.errors_name("out", shards.path(index), f"; {KEPT}"):
                shards.write(index, np.concatenate(batches), [number for number in ids if number in not_finite])
            watch.shard_is_done()
        ranks.wait_for_all(watch.wait)
        result = watch.finish()
        return replace(result, not_finite=ranks.share(lambda: _count_not_finite(shards)))


def _begin(shards: Shards, settings: dict[str, Any], about: dict[str, Any], until_the_end: ExitStack) -> list[int]:
    """Prepares the folder, on rank 0, and returns the numbers of the missing shards.

    Writes the manifest with `settings` and `about`. If there is a manifest, checks that it has the same settings, with
    at most as many samples, and writes the new number of samples. Checks that the existing shards are not damaged.
    Locks the manifest until the ExitStack `until_the_end` ends.
    """
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
                # The last shard was not full. It is removed before the new manifest is written, so that the folder is
                # valid at any time, even if this process is killed.
                before.remove(len(before) - 1)
            files.write_json(shards.manifest, {**manifest, "settings": settings})
            until_the_end.enter_context(files.lock(shards.manifest))  # the new manifest is another file, without a lock
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
        shards.read(index)  # raises ValueError if the shard is damaged
    return missing


def _count_not_finite(shards: Shards) -> int:
    """Counts the samples that were not finite, on rank 0, and writes their number to the manifest."""
    manifest, count = files.read_json(shards.manifest), len(shards.not_finite())
    if manifest.get("not_finite") != count:
        files.write_json(shards.manifest, {**manifest, "not_finite": count})
    return count


def _check_same(manifest: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of the manifest. Raises ValueError if it is no manifest, has other settings, or more samples."""
    try:
        content = files.read_json(manifest)
        form, old_settings = content["format"], content["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {manifest} is no manifest of samples") from error
    if form != _FORMAT:
        raise ValueError(f"out: {manifest} has format {form!r}, expected {_FORMAT!r}")
    if not isinstance(old_settings, dict):
        raise ValueError(f"out: {manifest} has settings {old_settings!r}, expected an object")
    names = [name for name in {**settings, **old_settings} if settings.get(name) != old_settings.get(name)]
    count, target = old_settings.get("num_images"), settings["num_images"]
    if isinstance(count, int) and 0 < count < target:
        names.remove("num_images")
    if names == ["num_images"]:
        raise ValueError(
            f"out: {manifest.parent} has {count} samples, of which none is removed; got num_images {target}, expected "
            "at least as many, or another folder"
        )
    if names:
        differ = "; ".join(f"{name} is {old_settings.get(name)} there and {settings.get(name)} here" for name in names)
        raise ValueError(f"out: {manifest.parent} has samples of other settings: {differ}; expected another folder")
    return dict(content)


def _wait_until_visible(path: Path) -> None:
    """Waits until a file that another rank wrote is visible on this machine.

    Raises:
        ValueError: the file is not visible after _VISIBLE_WITHIN seconds.
    """
    deadline, timed_out = time.monotonic() + _VISIBLE_WITHIN, False
    while not path.exists():
        if timed_out:
            raise ValueError(
                f"out: another rank wrote {path}, but here it is not; expected a folder that all share, and that no "
                "other program removes files from"
            )
        # After the deadline, the loop tests once more, since this process may have been stopped for a long time.
        timed_out = time.monotonic() > deadline
        time.sleep(0.1)


class _Watch:
    """Counts the missing shards of the folder while a rank draws or waits, and notices if the other ranks are stuck.

    Args:
        missing: the numbers of the shards that are missing at the start.
        bar: whether to show a progress bar.
        every: seconds between two times that the folder is listed.
    """

    def __init__(self, shards: Shards, missing: list[int], *, bar: bool, every: float) -> None:
        self.shards, self.every = shards, every
        self.sizes = {shards.path(index).name: len(shards.ids(index)) for index in missing}
        self.missing_samples = sum(self.sizes.values())
        self.start = self.shard_start = self.last_change = self.last_look = time.monotonic()
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
        """Lists the folder, counts its missing shards and updates the progress bar.

        Args:
            drawn: the number of samples of this rank's current shard that are drawn.
            now: whether to list the folder even if the last time is less than `every` seconds ago.
        """
        if not now and time.monotonic() - self.last_look < self.every:
            return
        self.last_look = time.monotonic()
        names = self.sizes.keys() - os.listdir(self.shards.inside)
        if len(names) != self.remaining:
            self.remaining, self.last_change = len(names), self.last_look
        if self.bar is not None:
            self.bar.update(self.shards.count - sum(self.sizes[name] for name in names) + drawn - self.bar.n)

    def shard_is_done(self) -> None:
        """Measures the duration of a shard. Called when this rank has written one."""
        now = time.monotonic()
        self.slowest, self.shard_start = max(self.slowest, now - self.shard_start), now

    def wait(self) -> None:
        """Checks the progress of the other ranks. Called repeatedly while this rank waits for them.

        A rank that drew no shard cannot estimate the duration of one, so it waits without a limit.

        Raises:
            TimeoutError: the other ranks have written no shard for too long.
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
        """Waits until all shards are visible on this machine, and returns the statistics of the run."""
        for name in self.sizes:
            _wait_until_visible(self.shards.inside / name)
        self.look(now=True)
        return Result(self.missing_samples, time.monotonic() - self.start)
