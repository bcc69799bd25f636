"""Reads and writes step tables as JSON files, which have the format's name and version, the columns' names, and a line
for each row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.files import read_json, write_text

FORMAT, VERSION = "ddpm_ext.StepTable", 4


def as_notes(notes: object) -> dict[str, Any]:
    """A copy of a table's notes after a round trip through JSON.

    Raises:
        TypeError: `notes` is not a dict, or JSON can't represent it.
    """
    try:
        copied = json.loads(json.dumps(notes, allow_nan=False)) if isinstance(notes, Mapping) else None
    except (TypeError, ValueError) as error:
        raise TypeError(f"notes are {notes!r}, expected what JSON has: {error}") from None
    if not isinstance(copied, dict):
        raise TypeError(f"notes are {notes!r}, expected a dict")
    return copied


def write(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    rows: Iterable[Sequence[float]],
    notes: Mapping[str, Any],
) -> None:
    """Writes the file atomically, with enough digits to read every number back exactly.

    Raises:
        ValueError: `path` is a folder or a device, or a number is not finite. OSError: it can't be written.
    """
    lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    head = f'  "format": "{FORMAT}",\n  "version": {VERSION},\n  "columns": {json.dumps(columns)}'
    if notes:
        head += f',\n  "notes": {json.dumps(notes)}'
    write_text(path, f'{{\n{head},\n  "rows": [\n{lines}\n  ]\n}}\n')


def read(
    path: str | os.PathLike[str], needed: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, list[Any]], Mapping[str, Any]]:
    """Reads a file's columns by name, all of `needed` and any of `optional`, and its notes. Values are not checked.

    Raises:
        ValueError: not JSON, a wrong format or version, columns missing or unknown, or no rows of numbers.
        OSError: it can't be read.
    """
    try:
        contents = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return _parse(contents, needed, optional), contents.get("notes", {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def gap_between(signal_now: Tensor, noise_now: Tensor, signal_after: Tensor, noise_after: Tensor) -> str | None:
    """A text about the first row that does not start where the previous row arrives, or about a wrong start or end.

    None if consecutive rows lead from noise to clean samples, or to noise above 0 and not below that of the start; or
    if the table has no levels. The levels are (rows,) each.
    """
    now, after = torch.stack([signal_now, noise_now], 1), torch.stack([signal_after, noise_after], 1)
    if not (now.any() or after.any()):
        return None
    for i, fits in enumerate((now[1:] - after[:-1]).abs().le(1e-6 * after[:-1].abs().clamp(min=1)).all(1).tolist()):
        if not fits:
            (signal, noise), (next_signal, next_noise) = after[i].tolist(), now[i + 1].tolist()
            arrives = f"row {i} arrives at signal {signal:g} and noise {noise:g}"
            return f"{arrives}, and row {i + 1} starts at {next_signal:g} and {next_noise:g}"
    first, last = noise_now[0].item(), noise_after[-1].item()
    if 0 < last < first:
        return f"the last row arrives at noise {last:g}, so that samples are not clean"
    return "row 0 starts at noise 0, at clean samples" if first == last == 0 else None


def _parse(contents: Any, needed: Sequence[str], optional: Sequence[str]) -> dict[str, list[Any]]:
    name = contents.get("format") if isinstance(contents, dict) else None
    if name != FORMAT:
        raise ValueError(f"format is {name!r}, expected {FORMAT!r}")
    version = contents.get("version")
    if version != VERSION:
        raise ValueError(f"version is {version!r}, expected {VERSION}, which this ddpm_ext reads")
    names, rows = contents.get("columns"), contents.get("rows")
    texts = list(map(str, names)) if isinstance(names, list) else []
    if len(set(texts)) != len(texts) or not set(needed) <= set(texts) <= {*needed, *optional}:
        raise ValueError(
            f"columns are {names!r}, expected {', '.join(needed)}, each once, and any of {', '.join(optional)}"
        )
    if not isinstance(rows, list) or not rows:
        raise ValueError("rows are missing, expected a list of at least 1 row")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError(f"rows[{i}] is {row!r}, expected a list of {len(names)} numbers")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
