"""What a run was started with, in its options.json, which a resume finds before the first checkpoint, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_ext.base import files
from ddpm_ext.training import checkpoints

__all__ = ["OPTIONS", "find", "save"]

OPTIONS = "options.json"


def save(folder: Path, options: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes the options of a run, and what its weights depend on besides, as a checkpoint's header has them.

    Raises OSError if the file can't be written; the message is one sentence.
    """
    path = folder / OPTIONS
    try:
        files.write_json(path, {"step": 0, "options": options, "about": about})
    except OSError as error:
        raise OSError(f"out: cannot write {path}: {error.strerror or error}") from error


def find(folder: Path, report: Callable[[str], None] = checkpoints.discard) -> tuple[Path, dict[str, Any]]:
    """What a run is resumed from: its newest checkpoint that can be read, or options.json if it has none.

    `report` is called with a line of text for each checkpoint that is damaged.

    The options are those of the last start, which options.json has: they may have been changed after the checkpoint.

    Returns:
        The path, and the options, the rest that the weights depend on, and the step.

    Raises:
        ValueError: the folder holds no run, or nothing that can be read.
    """
    found, path = checkpoints.latest(folder, report), folder / OPTIONS
    if found is not None:
        checkpoints.check_header(*found)
    try:
        begun = files.read_json(path)
        options, about = dict(begun["options"]), dict(begun["about"])
    except FileNotFoundError:
        if found is not None:
            return found
        raise ValueError(f"resume: {folder} holds no run, expected the folder of one that was started") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"resume: {path} is damaged; remove it, and the last checkpoint's options are used") from error
    if found is not None:
        return found[0], found[1] | {"options": options}
    return path, {"step": 0, "options": options, "about": about}
