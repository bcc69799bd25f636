"""Checkpoints of a training run. A checkpoint is a safetensors file. Its header holds the numbers and options of the
run as JSON."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.models.networks import FOLDERS

_FORMAT = "ddpm-ext training state 2"  # stored in each checkpoint. Other files are refused.
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def _checkpoints(folder: Path) -> list[Path]:
    """The paths of all checkpoints in a run's folder, by ascending step."""
    by_step = [
        (int(match[1]), path)
        for path in (folder / "checkpoints").glob("step-*.safetensors")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(by_step)]


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None. It may be damaged."""
    paths = _checkpoints(folder)
    return paths[-1] if paths else None


def save(folder: Path, step: int, state: dict[str, Tensor], about: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint atomically, then removes the checkpoints of earlier steps except for the newest `keep` - 1.

    Checkpoints of later steps stay and are not counted. A later checkpoint exists only if it is damaged: otherwise the
    run would have continued from it.

    Args:
        folder: the run's folder.
        step: the number of steps taken.
        state: the tensors.
        about: the header's content, which JSON can represent.
        keep: how many checkpoints remain, with the new one; at least 1.

    Raises:
        OSError: the file can't be written; the message is one sentence. In this case no checkpoint is removed.
    """
    to_bytes = require("safetensors.torch", "writing checkpoints").save
    path = folder / "checkpoints" / f"step-{step:08d}.safetensors"
    # Each tensor is copied, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    metadata = {"format": _FORMAT, "header": json.dumps(about)}
    content = to_bytes(tensors, metadata={**metadata, "crc32": _checksum(tensors, metadata["header"])})
    previous = newest(folder)
    remark = "no checkpoint was written before" if previous is None else f"the newest is still {previous}"
    with files.errors_name("checkpoint", path, f"; {remark}"):
        files.write_bytes(path, content)
    written = _checkpoints(folder)
    for old in written[: written.index(path) + 1][:-keep]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint's tensors and header. Raises ValueError if the file is damaged or not a checkpoint."""
    safetensors = require("safetensors", "reading checkpoints")
    try:
        with safetensors.safe_open(path, "pt") as opened:  # safe_open checks the file's length
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            header = json.loads(metadata["header"])
            if not isinstance(header, dict):
                raise ValueError(f"its header is a {type(header).__name__}, expected an object")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            checksum = _checksum(tensors, metadata["header"])
            if metadata.get("crc32", checksum) != checksum:  # files of earlier versions have no checksum
                raise ValueError(f"its content has the checksum {checksum}, expected {metadata['crc32']}")
            return tensors, header
    except Exception as error:  # Exception is the base class of safetensors' error
        raise ValueError(f"resume: {path} is cut short or damaged ({error})") from error


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """The CRC-32 of a text and of contiguous tensors on the CPU, with their names."""
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), checksum)
        )
    return f"{checksum:08x}"


def discard(text: str) -> None:
    """Ignores a line of text. It is the report function of a caller that reports nothing."""


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raises ValueError, naming the file, unless the header has a run's options, `about` and step number."""
    for name in ("options", "about"):
        if not isinstance(header.get(name), dict):
            raise ValueError(f"resume: {path} has no {name} in its header, expected the checkpoint of a run")
    step = header.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"resume: {path} has step {step!r}, expected an int, at least 0")


def latest(folder: Path, report: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
    """The path and header of the newest checkpoint that can be read, or None if there is no checkpoint.

    `report` is called with a line of text for each damaged checkpoint that is newer.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, load(path)[1]
        except ValueError as error:
            if path == paths[0]:
                raise
            report(f"{error}; trying the one before")
    return None


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`. The keys of the result are the names without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a killed process left in the folder of a run or of an average.

    It also removes temporary files in best/, in each ema-DECAY/, and in the sub-folders of all these that the run
    writes. It leaves out tuned/ and all other sub-folders, where another process may be writing.
    """
    for parent in (folder, folder / "best", *folder.glob("ema-*")):
        for name in ("", "checkpoints", "samples", "snapshots", "scheduler", *FOLDERS.values()):
            files.remove_leftovers(parent / name)
