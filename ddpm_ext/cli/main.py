"""`ddpm-ext` on the command line: runs a command, and turns errors into one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ddpm_ext.cli.arguments import build_parser, given_to_train

__all__ = ["main"]

_WRONG_INPUT, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ddpm-ext` and returns its exit code: 0, 2 for anything wrong with the input, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = "ddpm-ext"
    try:
        options = build_parser().parse_args(arguments)
        name = f"ddpm-ext {options.command}"
        from ddpm_ext.cli import commands
        from ddpm_ext.cli import plot as plot_command
        from ddpm_ext.cli import sample_many as many_command

        if options.command == "train":
            commands.train(options, given_to_train(arguments), arguments)
        else:
            many = options.command == "sample" and options.num_images is not None
            run = {
                "sample": many_command.run if many else commands.sample,
                "trajectory": commands.trajectory,
                "plot": plot_command.run,
                "info": commands.info,
            }
            run[options.command](options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # nobody reads what we print: no second error when Python ends
        return 1
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        return _wrong(name, " ".join(str(error).split()) or type(error).__name__)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise  # a fault of ours, which a traceback helps to find
        return _wrong(name, f"not enough memory on {getattr(options, 'device', 'cpu')}; a smaller batch may fit")
    return 0


def _wrong(name: str, reason: str) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        name += f", rank {os.environ.get('RANK')}"
    print(f"{name}: {reason}", file=sys.stderr)
    return _WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
