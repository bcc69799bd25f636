"""Compilers that a machine may have, some only under a name with their version."""

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
    """The command for a compiler; skips the test where there is none."""
    names = [name, *(f"{name}-{version}" for version in range(30, 9, -1))]
    command = next(filter(shutil.which, names), None)
    if command is None:
        pytest.skip(f"there is no {name} on PATH")
    return command


def compiled(
    compiler: str, source: str, folder: Path, flags: Iterable[str], libraries: Iterable[str] = ()
) -> ctypes.CDLL:
    """A shared library of a source in tests/support, which may include csrc's headers and torch's."""
    target = folder / "trial.so"
    include = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    command = [find_compiler(compiler), "-std=c++20", "-fPIC", "-shared", *flags, *include]
    subprocess.run([*command, ROOT / "tests/support" / source, *libraries, "-o", target], check=True)
    return ctypes.CDLL(str(target))
