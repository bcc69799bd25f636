"""`ddpm-ext` on the command line: runs a command, and reports an error as one sentence."""

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

_INTERRUPTED = 130
_FILES = {name: import_module(f"ddpm_ext.cli.{name.replace('-', '_')}") for name in COMMANDS}
"""The modules of the commands, by the commands' names."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ddpm-ext` with all its commands."""
    parser, commands = begin_parser(__version__, Parser)
    for file in _FILES.values():
        file.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ddpm-ext` and returns its exit code.

    The code is 0, or 2 if anything is wrong with the input or the output, 130 for Ctrl-C, or 1 if the work was done but
    its output was not read to the end. A command's run gets its options; `options.arguments` is the command line that
    they were parsed from.
    """
    keep_freed_memory()
    formatwarning = warnings.formatwarning
    options = argparse.Namespace(arguments=sys.argv[1:] if arguments is None else list(arguments), command=None)

    def one_line(message: Warning | str, category: type[Warning], *place: Any) -> str:
        """Leaves out the line of code that warned, which does not help the user of a command."""
        return f"{_name(options)}: {message}\n" if category is UserWarning else formatwarning(message, category, *place)

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        return _main(options)
    finally:
        warnings.formatwarning = formatwarning


def _main(options: argparse.Namespace) -> int:
    watched: dict[str, _Watched] = {}
    with ExitStack() as until_the_end:
        for name, redirect, ignored in _STREAMS:
            if getattr(sys, name) is not None:  # None: the stream was closed when the program started
                watched[name] = _Watched(getattr(sys, name), ignored)
                until_the_end.enter_context(redirect(cast(TextIO, watched[name])))
        code = _code_of(options, watched.get("stdout"))
    lost = {name: stream for name, stream in watched.items() if stream.error is not None}
    for name in lost:
        setattr(sys, name, None)  # otherwise Python would fail again when it flushes the stream at exit
    if "stdout" in lost and not isinstance(error := lost["stdout"].error, BrokenPipeError):
        return _wrong(options, f"the output cannot be written: {getattr(error, 'strerror', None) or error}")
    return code or int(bool(lost))


# For each stream: the errors that don't stop the work. A command goes on writing its files if nobody reads its lines
# or its progress bar. Errors of standard error can't be reported anywhere.
_STREAMS: tuple[tuple[str, Callable[[TextIO], AbstractContextManager[Any]], type[OSError]], ...] = (
    ("stdout", redirect_stdout, BrokenPipeError),
    ("stderr", redirect_stderr, OSError),
)


class _Watched:
    """A stream that records the error if it can't be written, for example on a full disk. (argparse ignores the error.)

    ignored: the errors that are not raised, so that the work goes on.
    """

    def __init__(self, stream: TextIO, ignored: type[OSError]) -> None:
        self.stream, self._ignored = stream, ignored
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._noting():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noting():
            self.stream.flush()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            if not isinstance(error, self._ignored):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _code_of(options: argparse.Namespace, stdout: _Watched | None) -> int:
    """Runs the command, and reports its errors, except those of stdout."""
    try:
        _run(options)
        if stdout is not None:
            stdout.flush()
    except SystemExit as stopped:  # argparse, after a help text or a wrong option; training, after a signal
        if stdout is not None:
            with suppress(OSError):
                stdout.flush()
        if isinstance(stopped.code, str):
            raise  # Python prints it
        return int(stopped.code or 0)
    except KeyboardInterrupt as interrupt:
        print("; ".join([f"\n{_name(options)}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if stdout is not None and error is stdout.error:
            return WRONG_INPUT
        return _wrong(options, str(error) or type(error).__name__)
    except UserCodeError as error:
        code = _wrong(options, str(error))
        traceback.print_exception(error.__cause__)
        return code
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # torch's signal handler may raise this in any line
            reason = f"data: a worker died ({' '.join(str(error).split())}); expected more memory"
        elif "out of memory" in str(error) or "can't allocate memory" in str(error):
            reason = f"not enough memory on {getattr(options, 'device', 'cpu')}; a smaller batch may fit"
        else:
            raise  # a bug in this package: the traceback helps to find it
        return _wrong(options, reason)
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
    _FILES[options.command].run(options)


def _name(options: argparse.Namespace) -> str:
    return " ".join(["ddpm-ext", *filter(None, (options.command, getattr(options, "kind", None)))])


def _wrong(options: argparse.Namespace, reason: str) -> int:
    name = _name(options)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        name += f", rank {os.environ.get('RANK')}"
    print(f"{name}: {shortened(reason)}", file=sys.stderr)
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
