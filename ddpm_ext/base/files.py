"""Atomic writing: a file is written under another name in the same folder and then renamed, so it is never partial."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_LARGEST_JSON = 2**28
_ABANDONED = 3600.0  # seconds after which nobody writes to a file any more


def _target(path: str | os.PathLike[str]) -> Path:
    # Where the path is a symbolic link, the file that it points to is replaced, and the link stays.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"out: {path} is a folder, expected a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"out: {path} is not a regular file, and renaming onto it would destroy it")
    return target


def _beside(target: Path) -> Path:
    """Another name in its folder, hidden, no longer than a name can be, and with its ending."""
    return target.with_name(f".{_short_stem(target)}.{secrets.token_hex(4)}{target.suffix}")


def _short_stem(target: Path) -> str:
    return os.fsdecode(os.fsencode(target.stem)[:200])


def _sync_folder(folder: Path) -> None:
    """Flushes a rename to the disk, on systems that can."""
    with suppress(OSError):  # Windows opens no folders, and some network file systems flush none
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new name beside `path`, with the same ending, to write to.

    When the block ends without an exception, the file is flushed to the disk and renamed to `path`. Otherwise it is
    removed, and a file that was at `path` before stays as it was. Missing parent folders are made.

    Raises ValueError if `path` is a folder or a device, OSError, which names `path`, if it can't be written.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile: only the owner can read its files, and the rename would not change that.
    beside = _beside(target)
    try:
        with errors_that_name(path, beside):
            yield beside
            with open(beside, "rb") as written:
                os.fsync(written.fileno())
            os.replace(beside, target)
            _sync_folder(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, of: Path | None = None, untouched: float = -math.inf) -> None:
    """Removes from a folder what killed processes left that were writing `of`, or any file. No other may be writing.

    untouched: for how many seconds it must not have been written to.
    """
    stem, suffix = ("*", "*") if of is None else (escape(_short_stem(of)), escape(of.suffix))
    for leftover in folder.glob(f".{stem}.{'[0-9a-f]' * 8}{suffix}"):
        status = leftover.lstat()  # not of what a link points to, which may be nowhere
        if time.time() - status.st_mtime > untouched:
            shutil.rmtree(leftover) if stat.S_ISDIR(status.st_mode) else leftover.unlink()


@contextmanager
def errors_that_name(path: str | os.PathLike[str], hidden: Path) -> Iterator[None]:
    """Raises an OSError that names no file, as write() does where a disk is full, or the file or folder `hidden`, which
    nobody knows, as one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not os.fsdecode(error.filename).startswith(os.fspath(hidden)):
            raise
        number, reason = error.errno or errno.EIO, error.strerror or str(error)
        raise OSError(number, reason, os.fspath(path)) from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path`, atomically."""
    with atomic_path(path) as beside:
        beside.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Writes `content` to `path` in UTF-8, atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` to `path` as indented JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_array(path: str | os.PathLike[str], array: npt.NDArray[Any]) -> None:
    """Writes an .npy, atomically."""
    # A file that is open for writing alone is written by numpy's own C code: on a full disk its error doesn't say why,
    # and what was left in its buffer is lost without any.
    with atomic_path(path) as beside, open(beside, "w+b") as opened:
        np.save(opened, array)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON in UTF-8, of a regular file of at most 256 MiB.

    Raises:
        OSError: it can't be read. ValueError: it is no such file, or no JSON, or nested too deeply.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write to it
        raise ValueError("it is not a regular file")
    if status.st_size > _LARGEST_JSON:
        raise ValueError(f"it has {status.st_size} bytes, expected at most {_LARGEST_JSON}")
    try:
        return json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError, naming the reason, if a file could not be written to `path`; leaves no file behind.

    With it, a command can report a wrong path before hours of work in place of afterwards. The file's folder is made
    where the one above it exists: a mistyped path makes no others. What earlier commands left that were killed while
    they wrote this file is removed.
    """
    try:
        target = _target(path)
        target.parent.mkdir(exist_ok=True)
        probe = _beside(target)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
        with suppress(OSError):  # it is another user's, or another command has finished the file meanwhile
            remove_leftovers(target.parent, target, untouched=_ABANDONED)
    except FileExistsError as error:
        raise ValueError(f"out: cannot write {path}: {error.filename} is no folder") from error
    except FileNotFoundError as error:
        raise ValueError(f"out: cannot write {path}: there is no folder {target.parent.parent}") from error
    except OSError as error:
        raise ValueError(f"out: cannot write {path}: {error.strerror or error}") from error


@contextmanager
def errors_name(option: str, path: str | os.PathLike[str], more: str = "") -> Iterator[None]:
    """Makes an OSError in the block name the file that cannot be written; the message begins with `option`, and ends
    with `more`."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{option}: cannot write {path}: {error.strerror or error}{more}") from error


@contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a file, which keeps a second run out of its folder. The lock ends with the process, even if it is killed.

    On file systems without locks it does nothing. Raises ValueError if another run has the lock.
    """
    with open(path, "rb") as opened:
        # A worker that is forked later inherits the open file, and would hold the lock for seconds after a killed run.
        register_after_fork(opened, type(opened).close)
        try:
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another run is at work in {Path(path).parent}") from None
        except (ImportError, OSError):
            pass  # Windows, or a network file system without locks
        yield
