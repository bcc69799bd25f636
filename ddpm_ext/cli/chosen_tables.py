"""The step tables that a command samples with in place of a sampler's: --table, and --sampler tuned."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path

from ddpm_ext.cli.network import model_hash
from ddpm_ext.models import tuned
from ddpm_ext.models.folder import LoadedModel
from ddpm_ext.tables.step_table import COLUMNS, StepTable

TUNED = "tuned"  # as a sampler's name

Tables = Mapping[float | None, StepTable]
"""By the scale of guidance; empty where a sampler has the table."""


def chosen_tables(options: argparse.Namespace, model: LoadedModel) -> Tables:
    """The tables of the options --table, --sampler, --steps and --guidance, which may have several scales.

    Warns where a table was tuned to another model.

    Raises:
        ValueError: an option beside them has no meaning then, or a file is missing or damaged.
    """
    if options.table is None and options.sampler != TUNED:
        return {}
    given = {"spacing": options.spacing is not None, "eta": options.eta is not None}
    for name, wrong in (given | {"steps": options.table is not None and options.steps is not None}).items():
        if wrong:
            beside = "a tuned table" if options.table is None else f"--table {options.table}"
            raise ValueError(f"{name}: got {getattr(options, name)} beside {beside}, which has rows of its own")
    scales = options.guidance if isinstance(options.guidance, tuple) else (options.guidance,)
    if options.table is not None:
        found = dict.fromkeys(scales, _load(Path(options.table)))
    else:
        found = {scale: _tuned(options, model, scale) for scale in scales}
    made_for = {table.notes.get(tuned.MODEL_SHA256) for table in found.values()} - {None}
    if made_for and made_for != {model_hash(model)}:
        warnings.warn(
            f"the table was tuned to another model than {options.model}: named samplers may come nearer than it does",
            stacklevel=2,
        )
    return found


def _tuned(options: argparse.Namespace, model: LoadedModel, scale: float | None) -> StepTable:
    """The table in the model's folder."""
    if options.steps is None:
        there = ", ".join(tuned.tables_in(model.folder)) or "none"
        raise ValueError(f"steps: expected that of a tuned table beside --sampler tuned; {options.model} has {there}")
    command = ["ddpm-ext", "tune", "--model", options.model, "--steps", str(options.steps)]
    command += [] if scale in (None, 1) else ["--guidance", f"{scale:g}"]
    try:
        return model.tuned(options.steps, scale)
    except (ValueError, OSError) as error:
        raise ValueError(f"sampler: {error}; {shlex.join(command)} makes it") from error


def _load(path: Path) -> StepTable:
    try:
        return StepTable.load(path)
    except OSError as error:
        raise ValueError(f"table: cannot read {path}: {error.strerror or error}") from error


def name_of(options: argparse.Namespace) -> str:
    """What the loop's steps are called in a picture."""
    return options.sampler if options.table is None else Path(options.table).name


def table_hash(table: StepTable) -> str:
    """The SHA-256 of a table's columns, whatever its notes say."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        column = getattr(table, name)
        digest.update(f"{name} {column.dtype} ".encode() + column.numpy().tobytes())
    return digest.hexdigest()
