"""What several commands share: the argument parser, parsers of values, names of samplers and spacings, and checks."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from ddpm_ext.base import files
from ddpm_ext.cli.overview import COMMANDS, Formatter
from ddpm_ext.tables.names import find_name, nearest_names, sampler_and_spacing
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA
from ddpm_ext.tables.spacing import DEFAULT_SPACING, SPACINGS

Number = TypeVar("Number", int, float)
WRONG_INPUT = 2  # the exit code for wrong input
_LONGEST_WORD = 250  # an error message shortens words that are longer than this, in characters
FIGURES = (".png", ".svg", ".pdf")  # the possible endings of a figure's file


class Parser(argparse.ArgumentParser):
    """A parser of arguments that reports an error as one sentence, without the usage, and suggests similar names.

    It does not accept abbreviated names of options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False})
        self._words: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits. If there is an unknown option, the message is about it instead.

        For example, if a required option is misspelled, argparse's message would only say that it is missing.
        """
        if self._subparsers is None:  # a parser with subparsers does not know the options of its commands
            words_before_dashes = takewhile(lambda word: word != "--", self._words)
            options = [word for word in words_before_dashes if word.startswith("--") and " " not in word]
            unknown = [option for option in options if option.partition("=")[0] not in self._option_string_actions]
            message = self._unrecognized(unknown) if unknown else message
        self.exit(WRONG_INPUT, f"{self.prog}: {shortened(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Reports unknown arguments as an error of this parser, whose message refers to the help of this command.

        argparse would report them as an error of the outermost parser.
        """
        self._words = list(sys.argv[1:] if args is None else args)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unrecognized(unknown))
        return options, unknown

    def _unrecognized(self, unknown: list[str]) -> str:
        option = unknown[0].partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        suggestions = f", expected an option such as {nearest_names(option, known)}" if option.startswith("-") else ""
        return f"unrecognized arguments: {' '.join(unknown)}{suggestions}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            suggestions = nearest_names(str(value), [str(choice) for choice in action.choices])
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}, expected one such as {suggestions}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        is_text = action.type in (None, str) and not isinstance(action, argparse._SubParsersAction)
        if not arg_string and is_text and arg_string != action.const:
            raise argparse.ArgumentError(action, "got an empty text, expected one with a character at least")
        return super()._get_value(action, arg_string)


def shortened(message: str) -> str:
    """The message, cut to fit on a screen, in one line.

    The middle of each long word is left out, and then the middle of the whole text if it is still long.
    """
    words = [
        word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD // 2]}...{word[-_LONGEST_WORD // 4 :]}"
        for word in message.split()
    ]
    text = " ".join(words)
    return text if len(text) <= 8 * _LONGEST_WORD else f"{text[: 6 * _LONGEST_WORD]} ... {text[-_LONGEST_WORD:]}"


Subparsers = Any
"""The type of the object that ArgumentParser.add_subparsers returns, which is private in argparse."""


def add_command(
    subparsers: Subparsers,
    command: str,
    description: str,
    *,
    summary: str | None = None,
    takes: str = "",
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Adds the parser of a command, such as "sample" or "plot grid", and returns it.

    Args:
        subparsers: the object that collects the parsers of all commands, or of all kinds of "plot".
        summary: the command's line in the list of commands. None means the line of COMMANDS.
        takes: the positional arguments, as the usage line shows them before the options, with a space at the end.
    """
    return subparsers.add_parser(
        command.split()[-1],
        prog=f"ddpm-ext {command}",
        usage=f"ddpm-ext {command} {takes}[options]",
        help=COMMANDS[command] if summary is None else summary,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
    )


# ------------------------------------------------------------------------------------------------ parsers of values


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""
    expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return _parser(int, lambda value: low <= value and (high is None or value <= high), expected)


def number(low: float, expected: str, *, below: float = math.inf) -> Callable[[str], float]:
    """A parser of finite numbers that are at least `low`, and less than `below`. expected: see _parser."""
    return _parser(float, lambda value: low <= value < below, expected)


def _parser(
    convert: Callable[[str], Number], is_in_range: Callable[[Number], bool], expected: str
) -> Callable[[str], Number]:
    """A parser of numbers in a range. expected: a description of these numbers, for the error's text."""

    def parse(text: str) -> Number:
        with suppress(ValueError):
            if is_in_range(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    """Parses whole numbers with commas between them. An empty text gives an empty tuple."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text}, expected whole numbers with commas between them") from None


def numbers(text: str) -> tuple[float, ...]:
    """Parses at least one finite number, with commas between them."""
    return tuple(finite_number(part) for part in text.split(","))


finite_number = number(-sys.float_info.max, "a finite number")
nonnegative_number = number(0, "a number >= 0")
positive_number = number(math.ulp(0), "a number > 0")
seed = whole_number(0, 2**64 - 1)
MOST_STEPS = 10**6  # a table with many more rows might not fit in memory
steps = whole_number(1, MOST_STEPS)
samples = whole_number(1, 10**9)


# ---------------------------------------------------------------------------------------------------- names

DEVICES = "cpu, cuda, cuda:1, ... (default: cuda where a GPU can be used)"
DEVICES_OF_RANKS = f"{DEVICES}; with several ranks, cuda means a GPU for each"
LISTED = "a name that ddpm-ext samplers lists"
SPACING = f"which timesteps: {LISTED}; or ddim25, 10,15,20 and the like (default: {DEFAULT_SPACING})"


class SpacingOfSampler(str):
    """The name of a spacing that came from the end of a sampler's name, as in "DPM++ 2M Karras".

    The class distinguishes it from a spacing that the option --spacing set.
    """


class SamplerName(argparse.Action):
    """The action of --sampler: stores this package's name of the sampler.

    From a name such as "DPM++ 2M Karras", which ends in the name of a spacing, it also stores the spacing.

    Args:
        known: the names that can be stored: this package's names of samplers, and for some commands "tuned".
    """

    def __init__(self, *args: Any, known: Collection[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known = known

    def __call__(self, parser: Any, options: argparse.Namespace, text: Any, _: str | None = None) -> None:
        explicit_spacing = None if isinstance(options.spacing, SpacingOfSampler) else options.spacing
        try:
            options.sampler, spacing = sampler_and_spacing(text, explicit_spacing, self.known, SPACINGS)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        options.spacing = SpacingOfSampler(spacing) if explicit_spacing is None and spacing is not None else spacing


class SpacingName(argparse.Action):
    """The action of --spacing: stores this package's name of the spacing; a text such as "ddim25" stays unchanged."""

    def __call__(self, parser: Any, options: argparse.Namespace, text: Any, _: str | None = None) -> None:
        spacing = find_name(text, SPACINGS) or text
        if isinstance(options.spacing, SpacingOfSampler) and spacing != options.spacing:
            raise argparse.ArgumentError(self, f"got {text}, but the name of the sampler has {options.spacing}")
        options.spacing = spacing


# --------------------------------------------------------------------------------------------------------- checks


def check_eta(eta: float | None, samplers: Collection[str]) -> None:
    """Raises ValueError for an eta other than None or 0 if none of the samplers has an eta."""
    if eta and not set(samplers) & set(WITH_ETA):
        raise ValueError(f"eta: got {eta}, but it belongs to {' or '.join(WITH_ETA)}")


def eta_of(sampler: str, eta: float | None) -> float | None:
    """The eta that a sampler uses: `eta`, or the sampler's default if that is None. None for a sampler without eta."""
    if sampler not in WITH_ETA:
        return None
    return inspect.signature(SAMPLERS[sampler]).parameters["eta"].default if eta is None else eta


def check_device(name: str) -> torch.device:
    """The device with this name. Raises ValueError, with the reason, if a command can't run on it."""
    if name.partition(":")[0].lower() == "gpu":
        raise ValueError(f"device: got {name}, expected cuda{name[3:]} for a GPU, or cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"device: {name} can't be used here ({reason})") from error
    # torch makes tensors on "meta" and on "cpu:1", too, but a command can't run there.
    if device.type == "meta" or (device.type == "cpu" and device.index):
        raise ValueError(f"device: got {name}, expected cpu, or cuda with or without a number")
    return device


def find_modules_here() -> None:
    """Makes modules in the working directory importable, for options such as --network MODULE:NAME."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def endings_help(endings: tuple[str, ...] = FIGURES) -> str:
    """The part of a help text that lists the possible endings of a file's name."""
    return f"ends in {' or '.join(endings)}"


def check_ending(out: str, endings: tuple[str, ...], name: str = "out") -> str:
    """The ending of a file's name, in lower case. Raises ValueError if it is not in `endings`."""
    ending = Path(out).suffix.lower()
    if ending not in endings:
        raise ValueError(f"{name}: got {out}, expected a name that {endings_help(endings)}")
    return ending


def check_out(out: str, endings: tuple[str, ...], name: str = "out") -> None:
    """Raises ValueError if a file's name doesn't end in one of `endings`, or the file can't be written."""
    check_ending(out, endings, name)
    files.check_writable(out)
