"""The command `ddpm-ext`. Each file of a command declares its options (add_parser) and does its work (run)."""

from ddpm_ext.cli.main import main

__all__ = ["main"]
