"""`ddpm-ext` on the command line: one file a command."""

from ddpm_ext.cli.main import main

__all__ = ["main"]
