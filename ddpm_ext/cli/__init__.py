"""The command `ddpm-ext`. The module of a command declares its options (add_parser) and does its work (run).

A command's run raises TypeError or ValueError for a wrong option or a file or folder that can't be read, OSError for a
file that can't be written, MissingExtra for a package that the command needs and that is not installed, and
UserCodeError if a function that an option names fails.
"""

from ddpm_ext.cli.main import main

__all__ = ["main"]
