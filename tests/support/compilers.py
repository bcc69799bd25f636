"""Compilers that a machine may have, some only under a name with their version."""

from __future__ import annotations

import shutil

import pytest


def find_compiler(name: str) -> str:
    """The command for a compiler; skips the test where there is none."""
    names = [name, *(f"{name}-{version}" for version in range(30, 9, -1))]
    command = next(filter(shutil.which, names), None)
    if command is None:
        pytest.skip(f"there is no {name} on PATH")
    return command
