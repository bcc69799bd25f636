"""`ddpm-ext table`: prints, saves, draws and compares the step table of a sampler or of a scheduler of diffusers."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.cli import arguments
from ddpm_ext.cli.chosen_tables import load_table
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.stored import one_line
from ddpm_ext.tables.names import nearest_names, sampler_and_spacing
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tables.step_table import StepTable

CONFIG = "scheduler_config.json"
FOLDER = f"a folder of diffusers with a {CONFIG}, or with one in its scheduler/"
FILES = f"a folder of diffusers with a {CONFIG}, or that file; or a .json file that StepTable.save wrote"
SOURCES = f"{arguments.LISTED}; {FILES}"
_EXAMPLES = """examples:
  ddpm-ext table --sampler dpmpp_2m --spacing karras --steps 20
  ddpm-ext table --scheduler FOLDER --steps 20 --save mine.json --plot mine.png
  ddpm-ext table --scheduler FOLDER --steps 20 --diff OTHER_FOLDER"""


def add_parser(commands: arguments.Subparsers) -> None:
    description = "Prints one row of numbers for each step, with which the next sample is made."
    parser = arguments.add_command(commands, "table", description, epilog=_EXAMPLES)
    group = parser.add_argument_group("what to print").add_mutually_exclusive_group(required=True)
    sampler: dict[str, Any] = {"action": arguments.SamplerName, "known": tuple(SAMPLERS)}
    group.add_argument("--sampler", **sampler, metavar="NAME", help=arguments.LISTED)
    group.add_argument("--scheduler", metavar="FOLDER", help=f"{FOLDER}; needs diffusers")
    add_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("--save", metavar="FILE", help="writes the table, to be read by StepTable.load; ends in .json")
    add("--plot", metavar="FILE", help=f"draws the table, with --diff both; {arguments.endings_help()}")
    other = f"prints instead how the table differs from another: {SOURCES}"
    add("--diff", type=source_name, metavar="OTHER", help=other)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that determine a table, which `table` and `plot table` have."""
    add = parser.add_argument_group("of samplers and schedulers").add_argument
    add("--steps", type=arguments.steps, metavar="N", help="steps of the loop (default for a sampler: all)")
    add = parser.add_argument_group("of schedulers").add_argument
    shift = "the logarithm of a flow's shift, with use_dynamic_shifting"
    add("--mu", type=arguments.finite_number, metavar="X", help=shift)
    add = parser.add_argument_group("of samplers").add_argument
    add("--spacing", action=arguments.SpacingName, metavar="NAME", help=arguments.SPACING)
    add("--eta", type=arguments.nonnegative_number, metavar="X", help="of those that ddpm-ext samplers marks with eta")
    add("--prediction", choices=SPACED_PREDICTIONS, default="eps", help="what the model predicts")
    add("--beta-schedule", choices=tuple(SCHEDULES), default="linear", help="how fast the noise grows")
    add("--timesteps", type=arguments.steps, default=1000, metavar="N", help="steps of the schedule")


def run(options: argparse.Namespace) -> None:
    """Prints the table or a difference, and writes what the options ask for."""
    for path, endings, name in ((options.save, (".json",), "save"), (options.plot, arguments.FIGURES, "plot")):
        if path is not None:
            arguments.check_out(path, endings, name)
    if options.plot is not None:
        require("matplotlib.figure", "drawing a table")
    if options.scheduler is not None and not os.path.exists(options.scheduler):
        raise ValueError(f"scheduler: got {options.scheduler}, expected {FOLDER}")
    source = options.sampler or options.scheduler
    if source == options.scheduler and _sampler_of(source) is not None:
        source = os.path.join(os.curdir, source)  # so that a folder with a sampler's name counts as a folder
    if isinstance(options.spacing, arguments.SpacingOfSampler):
        source, options.spacing = f"{source} {options.spacing}", None
    sources = [source, *([] if options.diff is None else [options.diff])]
    check_options(options, sources)
    tables = {source: table_of(source, options) for source in sources}
    table = tables[source]
    print(table if options.diff is None else table.diff(tables[options.diff]))
    if options.save is not None:
        table.save(options.save)
    if options.plot is not None:
        plots.step_table_figure(tables, options.plot)


def source_name(text: str) -> str:
    """This package's name for the sampler that `text` names, with its spacing if it has one, such as "euler karras".

    A text is returned unchanged if it names no sampler, contains a path separator, or is a path that exists.
    """
    if os.sep in text or os.path.exists(text):
        return text
    with suppress(ValueError):
        return " ".join(filter(None, sampler_and_spacing(text, None, SAMPLERS, SPACINGS)))
    return text


def _sampler_of(source: str) -> str | None:
    """The sampler in a text that source_name returned; None if the text names a file or folder."""
    sampler, _, spacing = source.partition(" ")
    return sampler if sampler in SAMPLERS and spacing in ("", *SPACINGS) else None


def check_options(options: argparse.Namespace, sources: list[str]) -> None:
    """Raises ValueError if --steps, --mu, --spacing or --eta is set and affects none of the sources.

    sources: texts that source_name returned.
    """
    samplers = [sampler for source in sources if (sampler := _sampler_of(source)) is not None]
    schedulers = [source for source in sources if _sampler_of(source) is None and not _is_table(source)]
    for name, relevant in (
        ("steps", samplers or schedulers),
        ("mu", schedulers),
        ("spacing", samplers),
        ("eta", samplers),
    ):
        if getattr(options, name) is not None and not relevant:
            kind = "scheduler" if name == "mu" else "sampler"
            raise ValueError(f"{name}: got {getattr(options, name)}, but there is no {kind} that it is for")
    if samplers:
        arguments.check_eta(options.eta, samplers)


def table_of(source: str, options: argparse.Namespace) -> StepTable:
    """The step table of a source: a sampler's name from source_name, a scheduler's folder or config, or a table's file.

    Raises:
        TypeError, ValueError: an option is out of range, or `source` is none of these.
        MissingExtra: the source needs diffusers, which is not installed.
    """
    if (sampler := _sampler_of(source)) is not None:
        diffusion = GaussianDiffusion(options.timesteps, options.beta_schedule, prediction=options.prediction)
        eta = arguments.eta_of(sampler, options.eta)
        chosen = LoopOptions(sampler=source, steps=options.steps, spacing=options.spacing, eta=eta)
        return make_loop_rows(diffusion, chosen).table
    path = Path(source)
    config = _config_of(source)
    if config is not None:
        return _traced(config, options.steps, options.mu)
    if path.is_dir():
        raise ValueError(f"table: {source} has no {CONFIG}, nor has its scheduler/, expected one of them")
    if not _is_table(source):
        near = nearest_names(source, SAMPLERS)
        raise ValueError(f"table: got {source}, expected a name such as {near} (ddpm-ext samplers lists them); {FILES}")
    return load_table(source)


def _config_of(source: str) -> Path | None:
    """The path of a scheduler's config; None if `source` names no config."""
    if _sampler_of(source) is not None:
        return None
    path = Path(source)
    candidates = (path, path / CONFIG, path / "scheduler" / CONFIG)
    return next((candidate for candidate in candidates if candidate.name == CONFIG and candidate.is_file()), None)


def _is_table(source: str) -> bool:
    """Whether `source` is the name of a file that StepTable.save may have written."""
    return Path(source).suffix.lower() == ".json" and _config_of(source) is None


def _traced(path: Path, steps: int | None, mu: float | None) -> StepTable:
    """The table of a scheduler of diffusers, from its config.

    The config may be untrusted. So the class that it names must be a scheduler of diffusers.
    """
    if steps is None:
        raise ValueError(f"steps: got none, expected a number of steps for the scheduler of {path}")
    try:
        config: dict[str, Any] = files.read_json(path)
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"table: {path} is no scheduler's config ({error!r})") from error
    diffusers = require("diffusers", "the table of a scheduler")
    cls: Any = getattr(diffusers.schedulers, str(name), None)
    base = diffusers.SchedulerMixin
    is_scheduler = isinstance(cls, type) and issubclass(cls, base) and cls is not base
    if not is_scheduler:
        raise ValueError(f"table: {path} is for a {name}, which is no scheduler of diffusers {diffusers.__version__}")
    _check_numbers(config, path)
    try:
        return StepTable.trace(cls.from_config(config), steps, **({} if mu is None else {"mu": mu}))
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # diffusers checks little, so a bad value can raise any exception
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"table: {path} makes no {name} that has a table ({reason})") from error


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    """Raises ValueError for a wrong num_train_timesteps or trained_betas, and for a whole number beyond MOST_STEPS.

    Such numbers in an untrusted config could exhaust memory or time.
    """
    most = arguments.MOST_STEPS
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        if name == "num_train_timesteps" and not (isinstance(value, int) and 1 <= value <= most):
            raise ValueError(f"table: {path} has {name} {value!r}, expected a whole number from 1 to {most}")
        are_betas = all(isinstance(beta, int | float) and 0 < beta <= 1 for beta in values)
        if name == "trained_betas" and value is not None and not are_betas:
            raise ValueError(f"table: {path} has {name} that are not numbers in (0, 1]")
        for number in values:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"table: {path} has {name} {number}, expected at most {most}")
