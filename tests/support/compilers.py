"""Finds compilers and compiles libraries for tests."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]


def find_compiler(name: str) -> str:
    """The command of a compiler, which may have its version in its name. Skips the test if there is none."""
    names = [name, *(f"{name}-{version}" for version in range(30, 9, -1))]
    command = next(filter(shutil.which, names), None)
    if command is None:
        pytest.skip(f"there is no {name} on PATH")
    return command


def compiled(
    compiler: str, source: str, folder: Path, flags: Iterable[str], libraries: Iterable[str] = ()
) -> ctypes.CDLL:
    """Compiles a source in tests/support, which may include headers of csrc and of torch, and loads the library."""
    target = folder / "trial.so"
    include = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    command = [find_compiler(compiler), "-std=c++20", "-fPIC", "-shared", *flags, *include]
    subprocess.run([*command, ROOT / "tests/support" / source, *libraries, "-o", target], check=True)
    return ctypes.CDLL(str(target))
