"""Step tables as JSON files: a format's name and version, the columns' names, and one line a row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ddpm_ext.base.files import read_json, write_text
from ddpm_ext.tables.levels import unit_levels

# Version 1 had no columns cu to k2. Up to version 2, levels were alphas_cumprod, now and after. Up to version 3, c3 was
# the factor of the x0 of the row before, which did not say that it keeps one.
FORMAT, VERSION = "ddpm_ext.StepTable", 4
OLD_LEVELS = ("now", "after")


def as_notes(notes: object) -> dict[str, Any]:
    """A copy of a table's notes, as a file gives them back. Raises TypeError where JSON can't have them."""
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
    """Writes the file atomically, with as many digits as it takes to read every number back exactly.

    Raises:
        ValueError: `path` is a folder or a device, or a number is not finite. OSError: it can't be written.
    """
    lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    head = f'  "format": "{FORMAT}",\n  "version": {VERSION},\n  "columns": {json.dumps(columns)}'
    if notes:
        head += f',\n  "notes": {json.dumps(notes)}'
    write_text(path, f'{{\n{head},\n  "rows": [\n{lines}\n  ]\n}}\n')


def read(
    path: str | os.PathLike[str], needed: Sequence[str], others: Sequence[str]
) -> tuple[dict[str, list[Any]], Mapping[str, Any]]:
    """The columns of a file by name: all of `needed`, any of `others`, and their values, which are not checked; and the
    notes.

    Raises:
        ValueError: not JSON, another format, a newer version, columns missing or unknown, or no rows of numbers.
        OSError: it can't be read.
    """
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return _with_kept_x0(_with_levels(_parse(found, needed, (*others, *OLD_LEVELS, "c3")))), found.get("notes", {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(found: Any, needed: Sequence[str], others: Sequence[str]) -> dict[str, list[Any]]:
    name = found.get("format") if isinstance(found, dict) else None
    if name != FORMAT:
        raise ValueError(f"format is {name!r}, expected {FORMAT!r}")
    version = found.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version is {version!r}, expected an int from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(f"version is {version}, newer than this ddpm_ext, which reads up to {VERSION}")
    names, rows = found.get("columns"), found.get("rows")
    texts = list(map(str, names)) if isinstance(names, list) else []
    if len(set(texts)) != len(texts) or not set(needed) <= set(texts) <= {*needed, *others}:
        raise ValueError(
            f"columns are {names!r}, expected {', '.join(needed)}, each once, and any of {', '.join(others)}"
        )
    if not isinstance(rows, list) or not rows:
        raise ValueError("rows are missing, expected a list of at least 1 row")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError(f"rows[{i}] is {row!r}, expected a list of {len(names)} numbers")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _with_levels(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns with levels of signal and noise in place of alphas_cumprod; a column of zeros had no levels.

    Raises ValueError where one is not in [0, 1].
    """
    for name in OLD_LEVELS:
        powers = columns.pop(name, [])
        if not all(isinstance(power, int | float) and 0 <= power <= 1 for power in powers):
            raise ValueError(f"{name} holds {powers}, expected 0 <= {name} <= 1")
        if any(powers):
            signal, noise = unit_levels(torch.tensor(powers, dtype=torch.float64, device="cpu"))
            columns |= {f"signal_{name}": signal.tolist(), f"noise_{name}": noise.tolist()}
    return columns


def _with_kept_x0(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns with h1, and k0 in the row before, in place of c3.

    Raises ValueError where that row cannot keep its x0.
    """
    c3 = columns.pop("c3", [])
    if not any(c3):
        return columns
    for i, factor in enumerate(c3[1:], start=1):
        if factor and not any(columns.get(name, [0] * i)[i - 1] for name in ("b", "c2")):
            raise ValueError(f"c3[{i}] is {factor}, but the row before it calls no model and has no x0, expected 0")
    for name in ("h1", "h2", "h3", "k0", "k1", "k2"):
        if any(columns.get(name, [])):
            raise ValueError(f"c3 and {name} are not 0, so that a row before another can't keep its x0, expected one")
    return columns | {"h1": c3, "k0": [*(int(factor != 0) for factor in c3[1:]), 0]}
