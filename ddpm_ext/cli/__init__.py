"""The command line program `ddpm-ext`.

Each command has a module with two functions: add_parser declares the command's options, and run does its work.

run raises TypeError or ValueError for a wrong option, or for a file or folder that can't be read; OSError for a file
that can't be written; MissingExtra for an optional package that is not installed; and UserCodeError for an exception in
a user's module that an option names, or in the function of --features.
"""

from ddpm_ext.cli.main import main

__all__ = ["main"]
