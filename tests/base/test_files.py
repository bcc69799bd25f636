"""ddpm_ext.base.files: a file is never partial, whatever happens while it is written."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from support.refused import refused

from ddpm_ext.base import files


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with pytest.raises(FileNotFoundError), files.atomic_path(path):
        pass
    assert not list(path.parent.iterdir())
    files.write_text(path, "ält")
    with pytest.raises(RuntimeError, match="half way"), files.atomic_path(path) as beside:
        beside.write_bytes(b"ne")
        raise RuntimeError("half way")
    assert path.read_text("utf-8") == "ält" and list(path.parent.iterdir()) == [path]


@pytest.mark.subprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_while_writing_keeps_the_old_file(tmp_path):
    """A lock ends with its process, not with the process's workers."""
    pytest.importorskip("fcntl")
    lock, path = tmp_path / ".lock", tmp_path / "a[1].bin"
    lock.touch()
    files.write_bytes(path, b"old")
    code = (
        "import multiprocessing, os, signal, sys, time\nfrom ddpm_ext.base import files\n"
        "def work(pipe):\n    pipe.send(os.getpid())\n    time.sleep(600)\n"
        "context = multiprocessing.get_context('fork')\nhere, there = context.Pipe()\n"
        "with files.lock(sys.argv[1]), files.atomic_path(sys.argv[2]) as beside:\n"
        "    context.Process(target=work, args=(there,)).start()\n    print(here.recv(), flush=True)\n"
        "    try:\n        files.lock(sys.argv[1]).__enter__()\n"
        "    except ValueError:\n        print('locked', flush=True)\n"
        "    beside.write_bytes(b'ne')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with open(tmp_path / "said", "w+") as said:
        done = subprocess.run([sys.executable, "-c", code, str(lock), str(path)], stdout=said, timeout=120)
        said.seek(0)
        worker, locked = said.read().split()
    try:
        assert (done.returncode, locked) == (-signal.SIGKILL, "locked") and path.read_bytes() == b"old"
        with files.lock(lock):
            os.kill(int(worker), 0)  # the worker still runs
    finally:
        os.kill(int(worker), signal.SIGKILL)
    (tmp_path / f".{path.stem}.0a1b2c3d.bin").symlink_to("nowhere")
    files.remove_leftovers(tmp_path, path)
    assert {each.name for each in tmp_path.iterdir()} == {".lock", "a[1].bin", "said"}


def test_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "x"
    (tmp_path / "plain").touch()
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "there" / "file").stat().st_mode


@pytest.mark.parametrize("write", [files.check_writable, lambda path: files.write_bytes(path, b"x")])
def test_devices_and_folders_are_refused(tmp_path, write):
    refused(ValueError, "folder", write, tmp_path)
    refused(ValueError, "regular file", write, "/dev/null")
    assert not os.path.isfile("/dev/null")


def test_check_writable(tmp_path):
    """Of this file, what a process left that was killed an hour ago is removed, and nothing that may be in use."""
    new, old, others = (tmp_path / "new" / f".{name}.0a1b2c3{i}.png" for i, name in enumerate("aab"))
    files.check_writable(tmp_path / "new" / "a.png")
    assert not list((tmp_path / "new").iterdir())
    for leftover, age in ((new, 0), (old, 3700), (others, 3700)):
        leftover.touch()
        os.utime(leftover, (time.time() - age,) * 2)
    files.check_writable(tmp_path / "new" / "a.png")
    assert sorted((tmp_path / "new").iterdir()) == [new, others]
    new.unlink(), others.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: cannot write .*file/a\.png: .*/file is no folder$"):
        files.check_writable(tmp_path / "file" / "a.png")
    refused(ValueError, "out: cannot write", files.check_writable, tmp_path / ("x" * 300 + ".png"))
    longest = tmp_path / "new" / ("ü" * 125 + ".txt")
    files.check_writable(longest)
    files.write_text(longest, "one")
    assert list(longest.parent.iterdir()) == [longest]


def test_rename_is_flushed_to_the_disk(tmp_path, monkeypatch):
    """The folder is synced after the file, once the file has its name."""
    seen, real = [], os.fsync

    def fsync(opened):
        seen.append((stat.S_ISDIR(os.fstat(opened).st_mode), (tmp_path / "a.txt").exists()))
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "a.txt", "one")
    assert seen == [(False, False), (True, True)]


def test_json_that_is_none(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    refused(ValueError, "it is nested too deeply", files.read_json, path)
    path.write_text("[1, 2")
    with pytest.raises(ValueError):
        files.read_json(path)
    files.write_json(path, {"a": [1]})
    refused(ValueError, "JSON", files.write_json, path, {"a": float("nan")})
    assert files.read_json(path) == {"a": [1]}
    monkeypatch.setattr(files, "_LARGEST_JSON", 9)
    refused(ValueError, "it has 23 bytes, expected at most 9", files.read_json, path)
    os.mkfifo(tmp_path / "pipe")
    refused(ValueError, "it is not a regular file", files.read_json, tmp_path / "pipe")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("9 requested, 2 written")])
def test_a_full_disk_names_the_path(tmp_path, error):
    with pytest.raises(OSError) as info, files.atomic_path(tmp_path / "a.npz"):
        raise error
    assert info.value.filename == str(tmp_path / "a.npz") and info.value.errno == (error.errno or errno.EIO)
    assert (error.strerror or str(error)) in str(info.value) and not list(tmp_path.iterdir())


def test_an_error_does_not_name_the_hidden_file(tmp_path):
    path = tmp_path / "folder" / "a.npz"
    with pytest.raises(FileNotFoundError) as info, files.atomic_path(path) as beside:
        path.parent.rmdir()
        beside.touch()
    assert info.value.filename == str(path)
