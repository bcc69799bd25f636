"""Runs in one folder, drawn one by one: errors end some of them, shards are lost, and the number of samples grows.

After each run, every shard has the right samples, and a run that ends well leaves the files of one run in a new folder.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from support.choices import for_many
from support.exact_run import contents

from ddpm_ext.base import files
from ddpm_ext.bulk.export import write_npz, write_pngs
from ddpm_ext.bulk.run import sample_many
from ddpm_ext.bulk.shards import Shards

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
NOT_FINITE = {1, 2, 7, 11}
LEFTOVERS = ("manifest.json", "shards/000000000-000000001.npy", "all.npz")


class Killed(BaseException):
    """Ends a run; `except Exception` does not see it."""


class Folder:
    """A folder, with what its last manifest says: count (0 before the first run), size, seed."""

    def __init__(self, path):
        self.path, self.count, self.size, self.seed = path, 0, 0, 0

    def shards(self, count):
        return Shards(self.path, count, self.size, IMAGES.shape[1:])

    def run(self, count, batch_size, ends_at=None, error=None):
        """Runs until sample number `ends_at` is drawn, which raises `error`."""
        not_finite = set()

        def draw(first, number):
            assert number <= batch_size
            numbers = range(first, first + number)
            if ends_at in numbers:
                raise error
            not_finite.update(NOT_FINITE.intersection(numbers))
            return IMAGES[first : first + number]

        options = {"batch_size": batch_size, "not_finite": not_finite}
        return sample_many(self.shards(count), {"seed": self.seed}, draw, **options)

    def everything(self):
        return {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}


def do_run(folder, choose):
    count, batch_size = choose.integer(max(folder.count, 1), len(IMAGES), "count"), choose.integer(1, 5, "batch")
    if not folder.count:
        folder.size, folder.seed = choose.integer(1, 5, "shard size"), 3
    shards = folder.shards(count)
    missing = [number for index in shards.missing() for number in shards.ids(index)]
    ends_at = choose.one_of(missing, "ends at") if missing and choose.one_of([False, False, True], "ends") else None
    folder.count = count
    try:
        error = choose.one_of([Killed, KeyError], "error")("the end")
        result = folder.run(count, batch_size, ends_at, error)
    except (Killed, KeyError):
        assert ends_at is not None
        return
    assert ends_at is None and result.drawn == len(missing)
    assert result.not_finite == len(NOT_FINITE.intersection(range(count)))
    with tempfile.TemporaryDirectory() as other:
        new = Folder(Path(other) / "new")
        new.size, new.seed = folder.size, folder.seed
        new.run(count, count)
        found = [
            {name: content for name, content in contents(path).items() if name.startswith("shards")}
            for path in (folder.path, new.path)
        ]
        assert found[0] == found[1]
        assert shards.manifest.read_bytes() == (new.path / "manifest.json").read_bytes()
    write_npz(shards, folder.path / "all.npz")
    write_pngs(shards, folder.path / "png")
    assert np.array_equal(np.load(folder.path / "all.npz")["arr_0"], IMAGES[:count])
    image = pytest.importorskip("PIL.Image")
    pictures = [np.asarray(image.open(path)) for path in sorted((folder.path / "png").iterdir())]
    assert np.array_equal(pictures, IMAGES[:count])
    assert not [path for path in folder.path.rglob(".*") if path.is_file()]  # what killed runs left


def do_run_that_does_not_fit(folder, choose):
    """Fewer samples, or samples of other settings: the folder keeps its files."""
    if not folder.count:
        return
    before, count, size, seed = folder.everything(), folder.count, folder.size, folder.seed
    change = choose.one_of(["count", "size", "seed"] if count > 1 else ["size", "seed"], "change")
    folder.size, folder.seed = size + (change == "size"), seed + (change == "seed")
    with pytest.raises(ValueError, match=f"{'num_images' if change == 'count' else change}.*another folder"):
        folder.run(count - (change == "count"), 2)
    folder.size, folder.seed = size, seed
    assert folder.everything() == before


def do_lose_a_shard(folder, choose):
    for path in sorted(folder.path.glob("shards/0*.npy"))[choose.integer(0, 4, "shard") :][:1]:
        path.unlink()


def do_leave_a_temporary_file(folder, choose):
    """As a process does that is killed while it writes."""
    path = folder.path / choose.one_of(LEFTOVERS, "file")
    if path.parent.is_dir():
        with pytest.raises(Killed), files.atomic_path(path) as temporary:
            temporary.touch()
            raise Killed
        temporary.write_bytes(b"torn")


def check_shards(folder):
    """Every shard is whole and has the right samples."""
    for path in folder.path.glob("shards/0*.npy"):
        first, last = map(int, path.stem.split("-"))
        assert np.array_equal(np.load(path), IMAGES[first : last + 1])


@for_many(80)
def test_any_runs(choose):
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(Path(path) / "run")
        if choose.one_of([False, True], "behind a link"):
            (Path(path) / "real").mkdir()
            folder.path.symlink_to(Path(path) / "real")
        for _ in range(choose.integer(1, 8, "calls")):
            choose.one_of(
                [do_run, do_run, do_run_that_does_not_fit, do_lose_a_shard, do_leave_a_temporary_file], "call"
            )(folder, choose)
            check_shards(folder)
