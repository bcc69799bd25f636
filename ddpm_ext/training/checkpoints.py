"""Checkpoints of a training run: one safetensors file each; what is not a tensor is JSON in the file's header."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.models.networks import FOLDERS

_FORMAT = "ddpm-ext training state 2"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def _all(folder: Path) -> list[Path]:
    """All checkpoints, by ascending step."""
    found = [
        (int(match[1]), path)
        for path in (folder / "checkpoints").glob("step-*.safetensors")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None. It may be damaged."""
    found = _all(folder)
    return found[-1] if found else None


def save(folder: Path, step: int, state: dict[str, Tensor], about: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint atomically, and then removes all checkpoints of earlier steps but the newest `keep` - 1.

    Checkpoints of later steps stay and are not counted. A run has them only if they are damaged: it would have
    continued from them otherwise.

    Args:
        folder: the run's folder.
        step: the number of steps taken.
        state: the tensors.
        about: the header, as JSON.
        keep: how many checkpoints to leave, at least 1.

    Raises:
        OSError: the file can't be written; the message is one sentence. No checkpoint is removed then.
    """
    to_bytes = require("safetensors.torch", "writing checkpoints").save
    path = folder / "checkpoints" / f"step-{step:08d}.safetensors"
    # safetensors refuses tensors that share memory, such as tied weights, so each is copied.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    content = to_bytes(tensors, metadata={"format": _FORMAT, "header": json.dumps(about)})
    before = newest(folder)
    left = "no checkpoint was written before" if before is None else f"the newest is still {before}"
    with files.errors_name("checkpoint", path, f"; {left}"):
        files.write_bytes(path, content)
    written = _all(folder)
    for old in written[: written.index(path) + 1][:-keep]:
        old.unlink()
    return path


def header(path: Path) -> dict[str, Any]:
    """Reads the header of a checkpoint; raises ValueError if the file is damaged or no checkpoint."""
    with _opened(path) as (_, found):
        return found


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header of a checkpoint; raises ValueError if the file is damaged or no checkpoint."""
    with _opened(path) as (opened, found):
        names = opened.keys()
        return {name: opened.get_tensor(name) for name in names}, found


def discard(text: str) -> None:
    """A report that nobody reads."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its header; safetensors checks the length of the file."""
    safetensors = require("safetensors", "reading checkpoints")
    try:
        with safetensors.safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            found = json.loads(metadata["header"])
            if not isinstance(found, dict):
                raise ValueError(f"its header is a {type(found).__name__}, expected an object")
            yield opened, found
    except Exception as error:  # safetensors' own error has no narrower base class
        raise ValueError(f"resume: {path} is cut short or damaged ({error})") from error


def check_header(path: Path, found: dict[str, Any]) -> None:
    """Raises ValueError, naming the file, unless the header is that of a run: with options, and a step's number."""
    for name in ("options", "about"):
        if not isinstance(found.get(name), dict):
            raise ValueError(f"resume: {path} has no {name} in its header, expected the checkpoint of a run")
    step = found.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"resume: {path} has step {step!r}, expected an int, at least 0")


def latest(folder: Path, report: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
    """Path and header of the newest checkpoint that can be read, or None if there is no checkpoint at all.

    `report` is called with a line of text for each newer one that is damaged.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    found = _all(folder)
    for path in reversed(found):
        try:
            return path, header(path)
        except ValueError as error:
            if path == found[0]:
                raise
            report(f"{error}; trying the one before")
    return None


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a killed process left in the folder of a run or of an average, and in the
    folders inside that are its own: in another run, or in tuned/, somebody may be writing."""
    files.remove_leftovers(folder)
    own = ("checkpoints", "samples", "snapshots", "scheduler", *FOLDERS.values())
    for pattern in (*own, "best", "best/*/", "ema-*/", "ema-*/*/"):
        for inside in folder.glob(pattern):
            files.remove_leftovers(inside)
