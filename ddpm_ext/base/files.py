"""Files appear whole or not at all: written beside their place under another name, then renamed into it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["atomic_path", "check_writable", "lock", "write_bytes", "write_json", "write_text"]


def _target(path: str | os.PathLike[str]) -> Path:
    # Through a symbolic link we replace the file that it points to, not the link.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"out: {path} is a folder, expected a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"out: {path} is not a regular file, and renaming onto it would destroy it")
    return target


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new name beside `path`, with the same ending, to write to.

    When the block ends well, the file is flushed to the disk and renamed to `path`; when it raises, the file is removed
    and what stood at `path` before is untouched. Missing parent folders are made.

    Raises ValueError if `path` is a folder or a device, OSError if it can't be written.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by the owner alone, and would stay so after the rename.
    beside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


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


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError, naming the reason, if a file could not be written to `path`; leaves no file behind.

    For asking before an hour of work, not after it.
    """
    try:
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot write {path}: {error.strerror or error}") from error


def _close(opened: BinaryIO) -> None:
    opened.close()


@contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps a second run out of the folder of a file, where the file system can; the system ends the lock with the
    process. Raises ValueError if there is one."""
    with open(path, "rb") as opened:
        # A worker that is forked later has it open, too, and outlives a killed run by seconds.
        register_after_fork(opened, _close)
        try:
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another run is at work in {Path(path).parent}") from None
        except (ImportError, OSError):
            pass  # Windows, or a network without locks
        yield
