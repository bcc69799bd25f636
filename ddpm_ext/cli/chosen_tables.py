"""Chooses step tables, which hold the coefficients of a loop's steps, by --table or --sampler tuned; or the default."""

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

TUNED = "tuned"  # the value of --sampler that selects a tuned table

DEFAULT_SAMPLER, DEFAULT_STEPS = "dpmpp_2m", 20
"""The default sampler and its steps if there is no tuned table. With this package's models, its samples have a smaller
Fréchet distance than those of ddpm in 1,000 steps: benchmarks/results/calls.md."""
DEFAULT = (
    f"the model's tuned table of --steps or else of the most steps, for this guidance; without one, or with options "
    f"that tables are not tuned for, {DEFAULT_SAMPLER} in {DEFAULT_STEPS} steps, or with RePaint's jumps ddpm"
)
# With any of these options, a tuned table is not the default. A loop with a table takes no spacing and no eta. With the
# other options the loop is not the usual one, for which most tables are tuned: from pure noise, with the default clip
# and plain guidance.
_NOT_TUNED_FOR = (
    "spacing",
    "eta",
    "clip",
    "threshold",
    "guidance_rescale",
    "guidance_interval",
    "start",
    "noise",
    "inpaint",
)

Tables = Mapping[float | None, StepTable]
"""{scale of guidance: its step table}. It is empty if the loop makes its table itself, from the name of a sampler."""


def scales_of(options: argparse.Namespace) -> tuple[float | None, ...]:
    """The scales of --guidance, for each of which a command draws samples; (None,) without guidance."""
    return options.guidance if isinstance(options.guidance, tuple) else (options.guidance,)


def choose_default(options: argparse.Namespace, model: LoadedModel, timesteps: int) -> str | None:
    """Sets `options.sampler` if the options have neither --sampler nor --table.

    It also sets `options.steps` if that is None, unless the sampler becomes ddpm, whose default is all timesteps, or
    the spacing determines the number of steps.

    timesteps: the model's number of timesteps.

    Returns:
        A line that names the choice; None if the options have a sampler or a table.
    """
    if options.sampler is not None or options.table is not None:
        return None
    unusual_clip = options.no_clip and model.clip
    untuned = unusual_clip or any(getattr(options, name) is not None for name in _NOT_TUNED_FOR)
    calls = set.intersection(*(tuned.calls_in(model.folder, scale) for scale in scales_of(options)))
    if options.steps is not None:
        calls &= {options.steps}
    if calls and not untuned and _suits_model(model, [model.tuned(max(calls), scale) for scale in scales_of(options)]):
        options.sampler, options.steps = TUNED, max(calls)
        return f"sampler: the tuned table of {options.model} in {max(calls)} steps; --sampler and --steps choose others"
    # RePaint's jumps need a sampler without history, which dpmpp_2m is not.
    if options.jump_n_sample is not None or options.jump_length is not None:
        options.sampler = "ddpm"
        return "sampler: ddpm, which is RePaint's; --sampler and --steps choose others"
    options.sampler = DEFAULT_SAMPLER
    # A spacing such as "ddim25" or "10,15,20" determines the number of steps.
    if options.steps is None and options.spacing in (None, *SPACINGS):
        options.steps = min(DEFAULT_STEPS, timesteps)
    steps = "" if options.steps is None else f" in {options.steps} steps"
    reason = f"{options.model} has no tuned table for this"
    return f"sampler: {DEFAULT_SAMPLER}{steps}, {reason}; --sampler and --steps choose others"


def _suits_model(model: LoadedModel, tables: Iterable[StepTable]) -> bool:
    """Whether none of the tables has the hash of another model in its notes. Tables without a hash suit any model."""
    return {table.notes.get(tuned.MODEL_SHA256) for table in tables} <= {None, model_hash(model)}


def chosen_tables(options: argparse.Namespace, model: LoadedModel) -> Tables:
    """For each scale of guidance the table of --table, or with --sampler tuned the model's tuned table for --steps.

    There are none for any other --sampler, whose table the loop makes. Warns if a table was tuned to another model.

    Raises:
        ValueError: an option has no effect together with a table, --sampler tuned has no --steps, or a file is missing
            or damaged.
    """
    if options.table is None and options.sampler != TUNED:
        return {}
    conflicts = {"spacing": options.spacing is not None, "eta": options.eta is not None}
    for name, is_conflict in (conflicts | {"steps": options.table is not None and options.steps is not None}).items():
        if is_conflict:
            table_option = "a tuned table" if options.table is None else f"--table {options.table}"
            raise ValueError(f"{name}: got {getattr(options, name)}, expected none with {table_option}")
    scales = scales_of(options)
    if options.table is not None:
        tables = dict.fromkeys(scales, load_table(options.table))
    else:
        tables = {scale: _tuned(options, model, scale) for scale in scales}
    if not _suits_model(model, tables.values()):
        warnings.warn(
            f"the table was tuned to another model than {options.model}: named samplers may come nearer than it does",
            stacklevel=2,
        )
    return tables


def _tuned(options: argparse.Namespace, model: LoadedModel, scale: float | None) -> StepTable:
    """The table in the model's folder that was tuned for --steps and this scale of guidance."""
    if options.steps is None:
        names, fitting = tuned.tables_in(model.folder), tuned.calls_in(model.folder, scale)
        makes = f"{tune_command(options, '4,6,8,10', scale)} makes some"
        raise ValueError(
            f"steps: got none with --sampler tuned, expected a tuned table's; {options.model} has "
            f"{', '.join(names) or 'none'}; {f'type --steps {max(fitting)}' if fitting else makes}"
        )
    try:
        return model.tuned(options.steps, scale)
    except (ValueError, OSError) as error:
        raise ValueError(f"sampler: {error}; {tune_command(options, options.steps, scale)} makes it") from error


def tune_command(options: argparse.Namespace, steps: object, scale: float | None) -> str:
    """The `ddpm-ext tune` command for tables of the options' model, with these steps and this scale of guidance."""
    command = ["ddpm-ext", "tune", "--model", options.model, "--steps", str(steps)]
    command += [] if scale in (None, 1) else ["--guidance", f"{scale:g}"]
    null = getattr(options, "null_class", None)
    return shlex.join([*command, *([] if null is None else ["--null-class", str(null)])])


def load_table(path: str) -> StepTable:
    """The table in a file. Raises ValueError if it can't be read."""
    try:
        return StepTable.load(path)
    except OSError as error:
        raise ValueError(f"table: cannot read {path}: {error.strerror or error}") from error


def name_of(options: argparse.Namespace) -> str:
    """The name of the loop in a picture's title: the sampler's name, or the table's file name."""
    return options.sampler if options.table is None else Path(options.table).name


def table_hash(table: StepTable) -> str:
    """The SHA-256 of a table's columns, without its notes."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        column = getattr(table, name)
        digest.update(f"{name} {column.dtype} ".encode() + column.numpy().tobytes())
    return digest.hexdigest()
