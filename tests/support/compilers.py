"""Compilers that a machine may have, some only under a name with their version; and what setup.py says to them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ddpm_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_compiler(name: str) -> str:
    """The command for a compiler; skips the test where there is none."""
    names = [name, *(f"{name}-{version}" for version in range(30, 9, -1))]
    command = next(filter(shutil.which, names), None)
    if command is None:
        pytest.skip(f"there is no {name} on PATH")
    return command
