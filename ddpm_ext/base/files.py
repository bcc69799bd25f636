"""Atomic writing of files: a file is written under another name in its folder, and renamed when it is complete."""

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

_LARGEST_JSON = 2**28  # bytes
_ABANDONED = 3600.0  # after this many seconds without a write, a temporary file counts as that of a killed process


def _target(path: str | os.PathLike[str]) -> Path:
    """The path of the file to write. Raises ValueError if it is a folder, a pipe or a device."""
    # For a symbolic link, the file that it points to is replaced, and the link stays.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"out: {path} is a folder, expected a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"out: {path} is not a regular file, and renaming onto it would destroy it")
    return target


def _temporary_name(target: Path) -> Path:
    """A new hidden path in the folder of `target`, with the same ending.

    A long name is cut, since file systems limit a name's length.
    """
    return target.with_name(f".{_short_stem(target)}.{secrets.token_hex(4)}{target.suffix}")


def _short_stem(target: Path) -> str:
    """The first 200 bytes of a file's name without its ending."""
    return os.fsdecode(os.fsencode(target.stem)[:200])


def _sync_folder(folder: Path) -> None:
    """Flushes the renames in a folder to the disk, if the system can."""
    with suppress(OSError):  # Windows can't open folders, and some network file systems can't flush them
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new path to write to, in the folder of `path` and with the same ending.

    When the block ends without an exception, the file is flushed to the disk and renamed to `path`. Otherwise it is
    removed, and a file that was at `path` before is not changed. Missing parent folders are created.

    Raises:
        ValueError: `path` is a folder, a pipe or a device.
        OSError: the file can't be written. The error names `path`, or the parent folder that can't be created.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The module tempfile is not used: only the owner could read its files, also after the rename.
    temporary = _temporary_name(target)
    try:
        with errors_that_name(path, temporary):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, of: Path | None = None, untouched: float = -math.inf) -> None:
    """Removes the temporary files and folders that killed processes left in `folder` while they wrote the file `of`.

    The caller ensures that no other process is writing this file, or sets `untouched`.

    Args:
        of: the file or folder that was to be written. None means any in the folder.
        untouched: only what was not written for this many seconds is removed. Default: all.
    """
    stem, suffix = ("*", "*") if of is None else (escape(_short_stem(of)), escape(of.suffix))
    for leftover in folder.glob(f".{stem}.{'[0-9a-f]' * 8}{suffix}"):
        status = leftover.lstat()  # not stat(), which fails for a link whose target does not exist
        if time.time() - status.st_mtime > untouched:
            shutil.rmtree(leftover) if stat.S_ISDIR(status.st_mode) else leftover.unlink()


@contextmanager
def errors_that_name(path: str | os.PathLike[str], temporary_target: Path) -> Iterator[None]:
    """Makes OSErrors in the block name `path`, the file or folder that the caller wants to write.

    This is for errors that name no file, as an error of write() on a full disk, and for errors that name the temporary
    file or folder `temporary_target` or a file in it. An error that names another file is not changed.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not os.fsdecode(error.filename).startswith(os.fspath(temporary_target)):
            raise
        number, reason = error.errno or errno.EIO, error.strerror or str(error)
        raise OSError(number, reason, os.fspath(path)) from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Writes `content` to `path` in UTF-8, atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` to `path` as indented JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_array(path: str | os.PathLike[str], array: npt.NDArray[Any]) -> None:
    """Writes an .npy, atomically."""
    # The mode "w+b" makes numpy write by Python's file object. For "wb" it writes by C code, whose error on a full disk
    # does not give the reason, and which loses the end of its buffer without an error.
    with atomic_path(path) as temporary, open(temporary, "w+b") as opened:
        np.save(opened, array)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON in UTF-8 from a regular file of at most 256 MiB.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no regular file, too large, no JSON, or nested too deeply.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise ValueError("it is not a regular file")
    if status.st_size > _LARGEST_JSON:
        raise ValueError(f"it has {status.st_size} bytes, expected at most {_LARGEST_JSON}")
    try:
        return json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError with the reason if a file could not be written to `path`. Leaves no file behind.

    With this check, a command can report a wrong path before hours of work. The file's folder is created if its parent
    exists. No other folders are created, since they would probably come from a mistyped path. Temporary files that
    commands left when they were killed while they wrote this file are removed after an hour.
    """
    try:
        target = _target(path)
        target.parent.mkdir(exist_ok=True)
        probe = _temporary_name(target)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
        with suppress(OSError):  # a temporary file belongs to another user, or another command has just renamed it
            remove_leftovers(target.parent, target, untouched=_ABANDONED)
    except FileExistsError as error:
        raise ValueError(f"out: cannot write {path}: {error.filename} is no folder") from error
    except FileNotFoundError as error:
        raise ValueError(f"out: cannot write {path}: there is no folder {target.parent.parent}") from error
    except OSError as error:
        raise ValueError(f"out: cannot write {path}: {error.strerror or error}") from error


@contextmanager
def errors_name(option: str, path: str | os.PathLike[str], more: str = "") -> Iterator[None]:
    """Makes OSErrors in the block name `path`. Their text begins with `option` and ends with `more`."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{option}: cannot write {path}: {error.strerror or error}{more}") from error


@contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a file while the block runs, so that no second run works in its folder.

    The lock also ends if the process is killed. On Windows and on file systems without locks, nothing is locked.

    Raises:
        ValueError: another run has the lock.
        OSError: the file can't be opened.
    """
    with open(path, "rb") as opened:
        # A forked worker inherits the open file and with it the lock. It closes the file at once. Otherwise a killed
        # run's lock would last until its workers end, seconds later.
        register_after_fork(opened, type(opened).close)
        try:
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another run is at work in {Path(path).parent}") from None
        except (ImportError, OSError):
            pass  # Windows, or a network file system without locks
        yield
