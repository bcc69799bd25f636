"""A run of one process: what it refuses, and what ends it in the middle. test_any_runs.py has what it writes."""

import errno
import json
import os

import numpy as np
import pytest
from support import exact_run
from support.exact_run import COUNT, SHAPE, SIZE, contents, joined, make_draw
from support.refused import refused

from ddpm_ext.bulk import run as bulk_run
from ddpm_ext.bulk.run import sample_many
from ddpm_ext.bulk.shards import Shards


@pytest.mark.parametrize("content", [b"", b"\x80 of something else", "short", "other", "archive"])
def test_damaged_shard_is_reported_before_the_work(tmp_path, content):
    shards, _ = exact_run.run(tmp_path)
    path = shards.path(3)
    if content == "short":
        content = path.read_bytes()[:-1]
    if content == "archive":
        with open(path, "wb") as opened:
            np.savez(opened, np.zeros((4, *SHAPE), np.uint8))
    elif content == "other":
        np.save(path, np.zeros((4, *SHAPE), np.float32))
    else:
        path.write_bytes(content)
    shards.path(0).unlink()
    with pytest.raises(ValueError, match=r"out: .*000000012-000000015.npy (is damaged|holds float32)") as info:
        exact_run.run(tmp_path)
    assert "unsafe" not in str(info.value)  # numpy's advice for a file that it takes for a pickle
    assert not shards.path(0).exists()


def test_other_settings_are_refused_by_name(tmp_path):
    settings = {"seed": 0, "eta": 0.5, "sampler": "ddim", "clip": (-1, 1)}
    exact_run.run(tmp_path, settings=settings)
    before = contents(tmp_path), (tmp_path / "manifest.json").read_bytes()
    assert exact_run.run(tmp_path, settings=dict(settings))[1].drawn == 0
    for change, options, message in (
        ({"eta": None}, {}, "eta is 0.5 there and None here"),
        ({"spacing": "leading"}, {}, "spacing is None there and leading here"),
        ({"sampler": "ddpm", "seed": 2}, {}, "seed is 0 there and 2 here; sampler is ddim there and ddpm here"),
        ({"seed": 2}, {"size": 5}, "seed is 0 there and 2 here; shard_size is 4 there and 5 here"),
    ):
        with pytest.raises(ValueError, match=f"samples of other settings: {message}; expected another folder"):
            exact_run.run(tmp_path, settings=settings | change, **options)
    message = rf"has {COUNT} samples, of which none is removed; got num_images {COUNT - 1}, "
    refused(ValueError, message, exact_run.run, tmp_path, settings=settings, count=COUNT - 1)
    assert (contents(tmp_path), (tmp_path / "manifest.json").read_bytes()) == before


def test_a_folder_that_cannot_be_written_does_not_grow(tmp_path, monkeypatch):
    exact_run.run(tmp_path, count=10)
    before = contents(tmp_path)

    def read_only(path):
        raise ValueError(f"out: cannot write {path}: Read-only file system")

    monkeypatch.setattr("ddpm_ext.base.files.check_writable", read_only)
    refused(ValueError, "cannot write .*manifest.json: Read-only", exact_run.run, tmp_path)
    assert contents(tmp_path) == before


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(ValueError, r"out: .*file is a file", exact_run.run, tmp_path / "file")
    (tmp_path / "a" / "shards").mkdir(parents=True)
    refused(ValueError, r"has shards but no manifest\.json", exact_run.run, tmp_path / "a")
    for content, message in (
        ("{", "is no manifest of samples"),
        ("[]", "is no manifest of samples"),
        ('{"format": "2", "settings": {}}', "has format '2', expected 'ddpm-ext samples 1'"),
        ('{"format": "ddpm-ext samples 1", "settings": []}', r"has settings \[\], expected an object"),
    ):
        (tmp_path / "a" / "manifest.json").write_text(content)
        refused(ValueError, message, exact_run.run, tmp_path / "a")


def test_manifest_is_written_first(tmp_path):
    def draw(first, count):
        raise RuntimeError("drawing begins")

    shards = Shards(tmp_path / "new", COUNT, SIZE, SHAPE)
    with pytest.raises(RuntimeError, match="drawing begins"):
        sample_many(shards, {"seed": 2**64 - 1}, draw, batch_size=1, about={"model": "mine"})
    found = json.loads((shards.folder / "manifest.json").read_text())
    message, settings = r"draw gave (float64|uint8) .*, expected uint8 of shape \(4, 4,", {"seed": 2**64 - 1}
    for given in (np.zeros((1, *SHAPE)), np.zeros((4, 4, 5, 1), np.uint8)):
        refused(ValueError, message, sample_many, shards, settings, lambda *_, given=given: given, batch_size=4)
    assert not list(shards.inside.iterdir())
    expected = {"seed": 2**64 - 1, "num_images": COUNT, "shard_size": SIZE, "shape": list(SHAPE)}
    assert (found["settings"], found["about"]) == (expected, {"model": "mine"})


def test_a_full_disk_keeps_the_shards_that_are_whole(tmp_path, truth, caplog):
    """The error says why. A limit of files' sizes stands in for the disk: 128 bytes of a header, and 240 of samples."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def draw(first, count):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 if first == 8 else soft, hard))
        return make_draw()(first, count)

    shards = Shards(tmp_path, COUNT, SIZE, SHAPE)
    try:
        with pytest.raises(OSError) as info:
            sample_many(shards, {"seed": 0}, draw, batch_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = f"{os.strerror(errno.EFBIG)}; what was finished is kept: run the same command again to go on"
    assert str(info.value) == f"out: cannot write {shards.path(2)}: {reason}"
    assert sorted(shards.inside.iterdir()) == [shards.path(0), shards.path(1)]
    caplog.set_level("INFO", "ddpm_ext")
    assert exact_run.run(tmp_path)[1].drawn == COUNT - 8 and np.array_equal(joined(shards), truth)
    assert caplog.messages == [f"{tmp_path}: goes on where 4 of 6 shards are missing"]


def test_one_run_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    shards, messages = Shards(tmp_path, COUNT, SIZE, SHAPE), []

    def draw(first, count):
        if not messages:
            with pytest.raises(ValueError) as caught:
                exact_run.run(tmp_path)
            messages.append(str(caught.value))
        return make_draw()(first, count)

    sample_many(shards, {"seed": 0}, draw, batch_size=2)
    assert messages == [f"out: another run is at work in {tmp_path}"]
    assert exact_run.run(tmp_path)[1].drawn == 0  # the lock has ended with the run


class Clock:
    """Stands in for the module time in ddpm_ext.bulk.run."""

    def __init__(self, monkeypatch, at_sleep=None):
        self.now, self.sleep = 100.0, at_sleep
        monkeypatch.setattr(bulk_run, "time", self)

    def monotonic(self):
        return self.now


def test_ranks_that_were_stopped_are_not_stuck(tmp_path, monkeypatch):
    shards, clock = exact_run.run(tmp_path)[0], Clock(monkeypatch)
    shards.path(1).unlink()
    watch = bulk_run._Watch(shards, [0, 1], bar=False, every=1.0)
    clock.now += 2
    watch.shard_is_done()
    for _ in range(2):
        clock.now += 5000
        for _ in range(600):
            clock.now += 1
            watch.wait()
    for _ in range(10):
        clock.now += 1
        watch.wait()
    with pytest.raises(TimeoutError, match="no shard has come for 620 s, and 1 are missing: a rank is stuck"):
        for _ in range(20):
            clock.now += 1
            watch.wait()


def test_a_file_that_came_while_this_process_was_stopped_is_seen(tmp_path, monkeypatch):
    looks = []

    class Late(type(tmp_path)):
        def exists(self):
            looks.append(clock.now)
            clock.now += 1000
            return len(looks) == 2

    clock = Clock(monkeypatch, at_sleep=lambda seconds: None)
    bulk_run._wait_until_visible(Late(tmp_path))
    looks.clear()
    looks += [0, 0]
    refused(ValueError, "but here it is not", bulk_run._wait_until_visible, Late(tmp_path))
    assert len(looks) == 4
