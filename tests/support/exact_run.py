"""Runs of ddpm_ext.bulk with a model for which a sample's bits do not depend on its batch.

The script `exact_run.py FOLDER '{"batch_size": 3, ...}'` is one rank of a run. forks.in_forks also starts it, as the
parent process of the ranks. The options are those of `run` and of `as_rank`. die_at = (own, all): the process kills
itself when it has written `own` shards and the folder has `all` shards. die_after: the process is killed after this
number of seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from support import forks

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.base import ranks as distributed
from ddpm_ext.bulk import run as bulk_run
from ddpm_ext.bulk.shards import Shards
from ddpm_ext.plots import to_uint8

COUNT, SIZE, SHAPE = 23, 4, (4, 5, 3)  # six shards, the last of three samples


def make_draw(seed: int = 0, pause: float = 0.0):
    """A function draw(first, count) that returns the samples with ids from `first` on, as uint8 images.

    pause: seconds to sleep for each sample.
    """
    diffusion = GaussianDiffusion(20)
    channels, height, width = SHAPE[2], *SHAPE[:2]

    def draw(first, count):
        time.sleep(pause * count)
        shape, rng = (count, channels, height, width), Philox(seed, sample_ids=first)
        options = {"steps": 5, "rng": rng, "record": "last", "progress": False, "device": "cpu"}
        return to_uint8(diffusion.p_sample_loop(lambda x, t: x * 0.5, shape, **options))

    return draw


def run(folder: Path, ranks=None, *, count=COUNT, size=SIZE, seed=0, batch_size=3, pause=0.0, settings=None):
    """Runs sample_many. Returns the shards and its result."""
    shards = Shards(Path(folder), count, size, SHAPE)
    draw = make_draw(seed, pause)
    result = bulk_run.sample_many(shards, settings or {"seed": seed}, draw, batch_size=batch_size, ranks=ranks)
    return shards, result


def contents(folder):
    """The bytes of every file in a folder except the manifest, by the file's path."""
    by_path = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del by_path["manifest.json"]
    return by_path


def joined(shards):
    return np.concatenate(list(shards.images()))


def kill_at(own: int, all_shards: int) -> None:
    """Makes this process kill itself when it has written `own` shards, after waiting for `all_shards` in the folder."""
    write, written = Shards.write, []

    def then_die(self, index, *arguments):
        write(self, index, *arguments)
        written.append(index)
        while len(written) == own:
            if len(list(self.inside.glob("0*.npy"))) >= all_shards:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

    Shards.write = then_die


def as_rank(
    folder, *, patience=None, visible_within=None, elsewhere=None, die_at=None, die_after=0.0, **options
) -> None:
    """Runs one rank, and prints "done" at its end.

    patience, visible_within: numbers that replace constants of bulk.run. elsewhere: a folder that replaces `folder`.
    """
    signal.setitimer(signal.ITIMER_REAL, die_after)
    bulk_run._PATIENCE = patience or bulk_run._PATIENCE
    bulk_run._VISIBLE_WITHIN = visible_within or bulk_run._VISIBLE_WITHIN
    with distributed.join() as ranks:
        if die_at:
            kill_at(*die_at)
        run(elsewhere or folder, ranks, **options)
    print("done", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == forks.FORKS:
        forks.serve(as_rank)
    else:
        as_rank(sys.argv[1], **json.loads(sys.argv[2]))
