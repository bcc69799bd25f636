"""Finds and writes the step tables in a model's folder that were tuned to the model.

For example, tuned/6.json is for 6 calls of the model without guidance, and tuned/6-guidance-2.5.json for 6 calls with a
guidance scale of 2.5.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from ddpm_ext.tables.step_table import StepTable

FOLDER = "tuned"
MODEL_SHA256 = "model_sha256"
"""The name of a note in a step table. The note is the SHA-256 of the model that the table was tuned to."""


def table_name(calls: int, guidance: float | None = None) -> str:
    """The name of a table's file. guidance: the scale; 1 and None mean no guidance."""
    return f"{calls}.json" if guidance in (None, 1) else f"{calls}-guidance-{guidance:g}.json"


def tables_in(folder: str | os.PathLike[str]) -> list[str]:
    """Descriptions of the tables in a model's folder, such as "4", "6", "6 with guidance 2.5"."""
    named = [re.fullmatch(r"(\d+)(?:-guidance-(.+))?\.json", path.name) for path in Path(folder, FOLDER).glob("*.json")]
    keys = sorted((match[2] or "", int(match[1])) for match in named if match)
    return [f"{calls}{f' with guidance {guidance}' * bool(guidance)}" for guidance, calls in keys]


def calls_in(folder: str | os.PathLike[str], guidance: float | None = None) -> set[int]:
    """The numbers of model calls for which the folder has tables with this scale of guidance."""
    names = [path.name for path in Path(folder, FOLDER).glob("*.json")]
    numbers = {int(match[0]) for name in names if (match := re.match(r"\d+", name))}
    return {calls for calls in numbers if table_name(calls, guidance) in names}


def save_tuned(table: StepTable, path: str | os.PathLike[str], *, model_sha256: str, seed: int) -> None:
    """Writes a tuned table. Its notes get the model's hash, and the seed of the samples to which it was fitted.

    Raises:
        ValueError: `path` is a folder or a device. OSError: it can't be written.
    """
    replace(table, notes=table.notes | {"seed": seed, MODEL_SHA256: model_sha256}).save(path)
