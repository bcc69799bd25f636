"""The list of `ddpm-ext`'s commands, and its output for --version and --help.

ddpm_ext_command.py runs this file without importing the package and torch, so that these outputs are fast. Therefore
this file imports only the standard library.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from typing import Any

COMMANDS = {  # {name of a command: its line in the list of commands}
    "sample": "draw samples into an .npz, a picture or a folder",
    "score": "measure how near finished samples are to images: FID, precision, recall",
    "invert": "find the noise that leads to an image",
    "train": "train a model",
    "average": "average a run's weights over another length",
    "tune": "fit step tables to a model",
    "compare": "compare samplers in few calls of a model",
    "bits-per-dim": "measure how well a model explains images",
    "trajectory": "draw how samples come about",
    "table": "print, save, draw and compare step tables",
    "samplers": "list the names of samplers and spacings",
    "plot": "draw schedules, step tables, losses and samples",
    "info": "show build, devices and instruction set",
}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default after the help text of each option that is not required, unless it is None, False or SUPPRESS.

    Does not wrap the lines of descriptions and examples.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets the indentation of commands, so the longest name would have a line of its own.
            self._action_max_length += 2

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_default = action.default is None or action.default is False or action.required
        return action.help if has_no_default else super()._get_help_string(action)


def begin_parser(
    version: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> tuple[argparse.ArgumentParser, Any]:
    """The parser of `ddpm-ext` without commands, and the object to which commands are added.

    kind: the class of this parser and of the commands' parsers.
    """
    parser = kind(
        prog="ddpm-ext",
        usage="ddpm-ext COMMAND [options]",
        description="Diffusion with one kernel launch a step, and the same noise for the same seed everywhere.",
        epilog="ddpm-ext COMMAND --help shows a command's options.",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"ddpm-ext {version}")
    return parser, parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")


def answer(arguments: Sequence[str]) -> str | None:
    """The output of `ddpm-ext` for these arguments; None for arguments that need the package and torch."""
    if list(arguments) == ["--version"]:
        return f"ddpm-ext {metadata.version('ddpm-ext')}\n"
    if list(arguments) not in ([], ["-h"], ["--help"], ["help"]):
        return None
    parser, commands = begin_parser("")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser.format_help()
