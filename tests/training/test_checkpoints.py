"""Checkpoints are written whole or not at all; a damaged one is reported, and the one before is used."""

import errno
import os

import pytest
import torch
from support.refused import refused
from support.trainer_run import assert_same

from ddpm_ext.training import checkpoints

safetensors_torch = pytest.importorskip("safetensors.torch")

STATE = {"a.x": torch.arange(6.0).view(2, 3), "a.y": torch.tensor(7), "b.x": torch.tensor([True])}


def save(folder, step, keep=2, **about):
    return checkpoints.save(folder, step, {**STATE, "step": torch.tensor(step)}, {"step": step, **about}, keep)


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 12, note="a \U0001f600", list=[1, None])
    tensors, header = checkpoints.load(path)
    assert header == {"step": 12, "note": "a \U0001f600", "list": [1, None]}
    assert tensors.keys() == {*STATE, "step"}
    assert_same({name: tensors[name] for name in STATE}, STATE)
    assert checkpoints.with_prefix(tensors, "a.").keys() == {"x", "y"}


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    base = torch.arange(8.0)
    shared = {"one": base, "two": base, "part": base[2:4], "turned": base.view(2, 4).T}
    assert_same(checkpoints.load(checkpoints.save(tmp_path, 1, shared, {}, 1))[0], shared)


def test_the_newest_are_kept_by_number(tmp_path):
    assert checkpoints.newest(tmp_path) is None and checkpoints.latest(tmp_path) is None
    for step in (99_999_998, 7, 100_000_001, 99_999_999):
        save(tmp_path, step, keep=9)
    assert checkpoints.newest(tmp_path).name == "step-100000001.safetensors"
    save(tmp_path, 100_000_002, keep=2)
    (tmp_path / "checkpoints" / ".step-100000003.0a1b2c3d.safetensors").write_bytes(b"half")  # of a killed writer
    assert checkpoints.newest(tmp_path).name == "step-100000002.safetensors"
    checkpoints.remove_leftovers(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-100000001.safetensors", "step-100000002.safetensors"]


def test_what_killed_processes_left_is_removed_in_all_folders_of_a_run(tmp_path):
    own = [".", "checkpoints", "samples", "snapshots", "scheduler", "unet", "transformer", "best", "best/unet"]
    own += ["ema-0.9", "ema-0.9/unet", "ema-0.9/scheduler"]
    others = ["average-0.1", "tuned", "another-run/unet", "best/tuned"]  # where other commands may be writing
    for inside in (*own, *others):
        (tmp_path / inside).mkdir(parents=True, exist_ok=True)
        for name in (".config.0a1b2c3d.json", ".step-3.0a1b2c3d.safetensors", "config.json", ".lock"):
            (tmp_path / inside / name).write_bytes(b"half")
    checkpoints.remove_leftovers(tmp_path)
    for inside, count in (*((each, 0) for each in own), *((each, 2) for each in others)):
        found = {path.name for path in (tmp_path / inside).iterdir() if path.is_file()}
        assert found >= {"config.json", ".lock"} and len(found) == 2 + count, inside


def test_later_ones_are_not_kept_in_place_of_what_was_written(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    checkpoints.newest(tmp_path).write_bytes(b"")
    for step in (12, 14):
        written = save(tmp_path, step, keep=1)
        assert checkpoints.latest(tmp_path, str)[0] == written
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000014.safetensors", "step-00000020.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.999])
def test_damaged_newest_falls_back(tmp_path, share):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(len(whole) * share)])
    lines = []
    path, header = checkpoints.latest(tmp_path, lines.append)
    assert (path.name, header) == ("step-00000001.safetensors", {"step": 1}) and len(lines) == 1
    assert lines[0].startswith(f"resume: {newest} is cut short or damaged (")
    assert lines[0].endswith("); trying the one before") and newest.stat().st_size == int(len(whole) * share)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_flipped_bit_is_damage(tmp_path, share):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    content = bytearray(newest.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")  # of the tensors, behind the header
    content[begin + int((len(content) - begin) * share)] ^= 4
    newest.write_bytes(content)
    refused(ValueError, "is cut short or damaged .its content has the checksum", checkpoints.load, newest)
    lines = []
    assert checkpoints.latest(tmp_path, lines.append)[0].name == "step-00000001.safetensors" and len(lines) == 1


def test_a_checkpoint_of_an_earlier_version_has_no_checksum(tmp_path):
    path = save(tmp_path, 1)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"crc32"', b'"other"'))
    assert checkpoints.load(path)[1] == {"step": 1}


def test_all_damaged(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2)]
    safetensors_torch.save_file(STATE, paths[0])  # not damaged, but no checkpoint
    paths[1].write_bytes(b"")
    lines = []
    refused(ValueError, r"resume: .*step-00000001\.safetensors is cut shor", checkpoints.latest, tmp_path, lines.append)
    assert len(lines) == 1 and paths[1].read_bytes() == b""
    for header, message in (
        ({"step": 1, "options": [], "about": {}}, "has no options in its header"),
        ({"step": -5, "options": {}, "about": {}}, "has step -5, expected an int, at least 0"),
    ):
        with pytest.raises(ValueError, match=f"^resume: .*a.safetensors {message}"):
            checkpoints.check_header(tmp_path / "a.safetensors", header)


def test_full_disk(tmp_path, monkeypatch):
    first = save(tmp_path, 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    message = f"checkpoint: cannot write {tmp_path}/checkpoints/step-00000002.safetensors: No space left on device; "
    with pytest.raises(OSError) as info:
        save(tmp_path, 2, keep=1)
    assert str(info.value) == f"{message}the newest is still {first}"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert checkpoints.load(first)[1] == {"step": 1}
    refused(OSError, "No space left on device; no checkpoint was written before", save, tmp_path / "new", 2)
