"""The function `main` of `ddpm-ext`, which runs a command and reports an error as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from typing import Any, TextIO, cast

from ddpm_ext.base.heap import keep_freed_memory
from ddpm_ext.cli.arguments import WRONG_INPUT, Parser, shortened
from ddpm_ext.cli.overview import COMMANDS, begin_parser
from ddpm_ext.training.import_by_name import UserCodeError
from ddpm_ext.version import __version__, default_device

_INTERRUPTED = 130  # the exit code after Ctrl-C, which shells also give: 128 + SIGINT
_MODULES = {name: import_module(f"ddpm_ext.cli.{name.replace('-', '_')}") for name in COMMANDS}
"""{name of a command: its module}."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ddpm-ext` with all its commands."""
    parser, commands = begin_parser(__version__, Parser)
    for module in _MODULES.values():
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ddpm-ext` and returns its exit code.

    The exit code is 0 if the command succeeded; 2 if it reported an error, such as wrong input or output that can't be
    written; 130 for Ctrl-C; and 143 if training was ended by SIGTERM. It is 1 if the command succeeded, but could not
    write all messages: the program that reads its standard output ended early, as in `ddpm-ext ... | head -1`, or the
    standard error can't be written. Exceptions that are probably bugs of this package are raised.

    arguments: the command line without the program's name. The command's function `run` gets it as options.arguments.
    """
    keep_freed_memory()
    formatwarning = warnings.formatwarning
    options = argparse.Namespace(arguments=sys.argv[1:] if arguments is None else list(arguments), command=None)

    def one_line(message: Warning | str, category: type[Warning], *location: Any) -> str:
        """A warning's text. That of a UserWarning lacks the line of code, which does not help the user of a command."""
        return (
            f"{_program_name(options)}: {message}\n"
            if category is UserWarning
            else formatwarning(message, category, *location)
        )

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        return _main(options)
    finally:
        warnings.formatwarning = formatwarning


def _main(options: argparse.Namespace) -> int:
    streams: dict[str, _WatchedStream] = {}
    with ExitStack() as until_the_end:
        for name, redirect, ignored in _STREAMS:
            if getattr(sys, name) is not None:  # it is None if the stream was closed when the program started
                streams[name] = _WatchedStream(getattr(sys, name), ignored)
                until_the_end.enter_context(redirect(cast(TextIO, streams[name])))
        code = _code_of(options, streams.get("stdout"))
    failed = {name: stream for name, stream in streams.items() if stream.error is not None}
    for name in failed:
        setattr(sys, name, None)  # otherwise Python would try to flush the stream at exit, and fail
    if "stdout" in failed and not isinstance(error := failed["stdout"].error, BrokenPipeError):
        return _report(options, f"the output cannot be written: {getattr(error, 'strerror', None) or error}")
    return code or int(bool(failed))


# For each stream: its name, the function that redirects it, and the errors of writing to it that are ignored. If no
# program reads the standard output any more, a command still writes its files. If the standard error can't be written,
# no message could say so.
_STREAMS: tuple[tuple[str, Callable[[TextIO], AbstractContextManager[Any]], type[OSError]], ...] = (
    ("stdout", redirect_stdout, BrokenPipeError),
    ("stderr", redirect_stderr, OSError),
)


class _WatchedStream:
    """A stream that records the last error of writing to it, for example on a full disk.

    The record is needed since argparse ignores errors when it prints a help text.

    ignored: the errors that are recorded but not raised, so that the work goes on.
    """

    def __init__(self, stream: TextIO, ignored: type[OSError]) -> None:
        self.stream, self._ignored = stream, ignored
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._recording_errors():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._recording_errors():
            self.stream.flush()

    @contextmanager
    def _recording_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            if not isinstance(error, self._ignored):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _code_of(options: argparse.Namespace, stdout: _WatchedStream | None) -> int:
    """Runs the command and returns its exit code. Reports its errors, but leaves errors of stdout to _main."""
    try:
        _run(options)
        if stdout is not None:
            stdout.flush()
    except SystemExit as stopped:  # argparse exits after a help text or a wrong option, training after a signal
        if stdout is not None:
            with suppress(OSError):
                stdout.flush()
        if isinstance(stopped.code, str):
            raise  # Python prints the text
        return int(stopped.code or 0)
    except KeyboardInterrupt as interrupt:
        print("; ".join([f"\n{_program_name(options)}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if stdout is not None and error is stdout.error:
            return WRONG_INPUT
        return _report(options, str(error) or type(error).__name__)
    except UserCodeError as error:
        code = _report(options, str(error))
        traceback.print_exception(error.__cause__)
        return code
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # torch's signal handler raises it, at any line of the program
            reason = f"data: a worker died ({' '.join(str(error).split())}); expected more memory"
        elif "out of memory" in str(error) or "can't allocate memory" in str(error):
            reason = f"not enough memory on {getattr(options, 'device', 'cpu')}; a smaller batch may fit"
        else:
            raise  # probably a bug in this package, which a traceback helps to find
        return _report(options, reason)
    return 0


def _run(options: argparse.Namespace) -> None:
    parser, words = build_parser(), options.arguments
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    parser.parse_args(words, options)
    if options.command is None:
        parser.print_help()
        return
    if "device" in options and options.device is None:
        options.device = default_device()
    _MODULES[options.command].run(options)


def _program_name(options: argparse.Namespace) -> str:
    """The program's name with its command, such as "ddpm-ext plot grid", with which messages begin."""
    return " ".join(["ddpm-ext", *filter(None, (options.command, getattr(options, "kind", None)))])


def _report(options: argparse.Namespace, reason: str) -> int:
    """Prints an error on the standard error, and returns the exit code for wrong input."""
    name = _program_name(options)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        name += f", rank {os.environ.get('RANK')}"
    print(f"{name}: {shortened(reason)}", file=sys.stderr)
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
