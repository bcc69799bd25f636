"""The step tables that a command samples with in place of a sampler's: --table, and --sampler tuned; and what it takes
where neither is given."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from ddpm_ext.cli.network import model_hash
from ddpm_ext.models import tuned
from ddpm_ext.models.folder import LoadedModel
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tables.step_table import COLUMNS, StepTable

TUNED = "tuned"  # as a sampler's name

FEW, FEW_STEPS = "dpmpp_2m", 20
"""The sampler and steps where there is no tuned table: on the models of this package, as near to the data as 1,000 of
ddpm."""
DEFAULT = (
    f"the model's tuned table of --steps or else of the most steps, for this guidance; without one, or with options "
    f"that tables are not tuned for, {FEW} in {FEW_STEPS} steps, or with RePaint's jumps ddpm"
)
# A table is tuned to samples that begin as noise, with the usual clip and guidance.
_UNTUNED = ("spacing", "eta", "clip", "threshold", "guidance_rescale", "guidance_interval", "start", "noise", "inpaint")

Tables = Mapping[float | None, StepTable]
"""By the scale of guidance; empty where a sampler has the table."""


def scales_of(options: argparse.Namespace) -> tuple[float | None, ...]:
    """The scales of --guidance, which a command draws one after another; (None,) without guidance."""
    return options.guidance if isinstance(options.guidance, tuple) else (options.guidance,)


def choose_default(options: argparse.Namespace, model: LoadedModel, timesteps: int) -> str | None:
    """Where neither --sampler nor --table is given, sets `options.sampler` and `options.steps`.

    timesteps: of the model.

    Returns:
        A line that says what was chosen; None where something was given.
    """
    if options.sampler is not None or options.table is not None:
        return None
    untuned = options.no_clip or any(getattr(options, name) is not None for name in _UNTUNED)
    calls = set.intersection(*(tuned.calls_in(model.folder, scale) for scale in scales_of(options)))
    if options.steps is not None:
        calls &= {options.steps}
    if calls and not untuned and _is_of(model, [model.tuned(max(calls), scale) for scale in scales_of(options)]):
        options.sampler, options.steps = TUNED, max(calls)
        return f"sampler: the tuned table of {options.model} in {max(calls)} steps; --sampler and --steps choose others"
    if options.jump_n_sample is not None or options.jump_length is not None:  # a jump goes back: no history
        options.sampler = "ddpm"
        return "sampler: ddpm, which is RePaint's; --sampler and --steps choose others"
    options.sampler = FEW
    if options.steps is None and options.spacing in (None, *SPACINGS):  # another spacing says how many
        options.steps = min(FEW_STEPS, timesteps)
    steps = "" if options.steps is None else f" in {options.steps} steps"
    return f"sampler: {FEW}{steps}, {options.model} has no tuned table for this; --sampler and --steps choose others"


def _is_of(model: LoadedModel, tables: Iterable[StepTable]) -> bool:
    """Whether no table was tuned to another model."""
    return {table.notes.get(tuned.MODEL_SHA256) for table in tables} <= {None, model_hash(model)}


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
    scales = scales_of(options)
    if options.table is not None:
        found = dict.fromkeys(scales, load_table(options.table))
    else:
        found = {scale: _tuned(options, model, scale) for scale in scales}
    if not _is_of(model, found.values()):
        warnings.warn(
            f"the table was tuned to another model than {options.model}: named samplers may come nearer than it does",
            stacklevel=2,
        )
    return found


def _tuned(options: argparse.Namespace, model: LoadedModel, scale: float | None) -> StepTable:
    """The table in the model's folder."""
    if options.steps is None:
        there, fitting = tuned.tables_in(model.folder), tuned.calls_in(model.folder, scale)
        makes = f"{tune_command(options, '4,6,8,10', scale)} makes some"
        raise ValueError(
            f"steps: expected that of a tuned table beside --sampler tuned; {options.model} has "
            f"{', '.join(there) or 'none'}; {f'type --steps {max(fitting)}' if fitting else makes}"
        )
    try:
        return model.tuned(options.steps, scale)
    except (ValueError, OSError) as error:
        raise ValueError(f"sampler: {error}; {tune_command(options, options.steps, scale)} makes it") from error


def tune_command(options: argparse.Namespace, steps: object, scale: float | None) -> str:
    """What to type for tables of the options' model with so many steps, at this scale of guidance."""
    command = ["ddpm-ext", "tune", "--model", options.model, "--steps", str(steps)]
    command += [] if scale in (None, 1) else ["--guidance", f"{scale:g}"]
    null = getattr(options, "null_class", None)
    return shlex.join([*command, *([] if null is None else ["--null-class", str(null)])])


def load_table(path: str) -> StepTable:
    """A table in a file. Raises ValueError where it can't be read."""
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
