"""A training run's checkpoints: one safetensors file each, with its options as JSON in the file's own header."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ext import files
from ddpm_ext.extras import require

__all__ = ["load", "newest", "part", "save"]

_FORMAT = "ddpm-ext training state 1"
_NAME = re.compile(r"step-(\d{8})\.safetensors")


def _all(folder: Path) -> list[Path]:
    """Oldest first"""
    found = [path for path in (folder / "checkpoints").glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a run's folder, if it has any."""
    found = _all(folder)
    return found[-1] if found else None


def save(folder: Path, step: int, state: dict[str, Tensor], options: dict[str, Any], keep: int) -> Path:
    """Writes `state`, atomically, then removes all checkpoints but the newest `keep`."""
    to_bytes = require("safetensors.torch", "writing checkpoints").save
    path = folder / "checkpoints" / f"step-{step:08d}.safetensors"
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    files.write_bytes(path, to_bytes(tensors, metadata={"format": _FORMAT, "options": json.dumps(options)}))
    for old in _all(folder)[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the options in a checkpoint; raises ValueError if it is damaged or something else."""
    safetensors = require("safetensors", "reading checkpoints")
    try:
        with safetensors.safe_open(path, "pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError("no training state")
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}, json.loads(header["options"])
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ValueError(f"resume: {path} is cut short or damaged ({error})") from error


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
