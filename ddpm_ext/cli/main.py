"""`ddpm-ext` on the command line: runs a command, and reports an error as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ddpm_ext.base.heap import keep_freed_memory
from ddpm_ext.cli import bits_per_dim, info, invert, plot, sample, table, train, trajectory
from ddpm_ext.cli.arguments import WRONG_INPUT, Formatter, Parser
from ddpm_ext.version import __version__, default_device

__all__ = ["build_parser", "main"]

_INTERRUPTED = 130
_COMMANDS = {
    "sample": sample,
    "invert": invert,
    "train": train,
    "bits-per-dim": bits_per_dim,
    "trajectory": trajectory,
    "table": table,
    "plot": plot,
    "info": info,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ddpm-ext` with all its commands."""
    parser = Parser(
        prog="ddpm-ext",
        usage="ddpm-ext COMMAND [options]",
        description="Diffusion with one kernel launch a step, and the same noise for the same seed everywhere.",
        epilog="ddpm-ext COMMAND --help shows a command's options.",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"ddpm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in _COMMANDS.values():
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ddpm-ext` and returns its exit code: 0, 2 if anything is wrong with the input, or 130 for Ctrl-C.

    A command's run gets its options, and as `options.arguments` the command line that they were parsed from.
    """
    keep_freed_memory()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = "ddpm-ext"
    options = argparse.Namespace(arguments=arguments)
    try:
        parser = build_parser()
        parser.parse_args(arguments, options)
        if options.command is None:
            parser.print_help()
            return 0
        name = f"ddpm-ext {options.command}"
        if "device" in options and options.device is None:
            options.device = default_device()
        _COMMANDS[options.command].run(options)
        if sys.stdout is not None:  # it was closed when the program began
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader has closed the pipe; without this, Python would fail again on its way out
        return 1
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        return _wrong(name, " ".join(str(error).split()) or type(error).__name__)
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # its handler of signals raises wherever the program is
            return _wrong(name, f"data: a worker died ({' '.join(str(error).split())}); expected more memory")
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise  # a defect of this package, which a traceback helps to find
        return _wrong(name, f"not enough memory on {getattr(options, 'device', 'cpu')}; a smaller batch may fit")
    return 0


def _wrong(name: str, reason: str) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        name += f", rank {os.environ.get('RANK')}"
    print(f"{name}: {reason}", file=sys.stderr)
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
