"""The command `ddpm-ext`. Each file of a command declares its options (add_parser) and does its work (run).

A command's run raises TypeError or ValueError for an option that is wrong, and for a file or folder that can't be read,
OSError where a file can't be written, MissingExtra where a package is not installed that the command needs, and
UserCodeError where a function that an option names fails.
"""

from ddpm_ext.cli.main import main

__all__ = ["main"]
