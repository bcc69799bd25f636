"""Loads the compiled module ddpm_ext._C, as `C`. If this fails, an ImportError gives the reason and a command to run.

`BUILT` is the JSON that setup.py writes next to the module: the versions of torch and CUDA and the GPU architectures
for which it was built, or why it has no CUDA.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "ddpm_ext._C"
FOLDER = Path(__file__).resolve().parents[1]  # the package's folder, where setup.py puts the module


def in_sources() -> bool:
    """Whether this package was imported from a source folder, as by Python when it runs in that folder."""
    return (FOLDER.parent / "setup.py").is_file() and (FOLDER.parent / "csrc").is_dir()


def mend(variables: str = "") -> str:
    """The command that builds the module again. In the source folder it is an editable install, which builds in place.

    Args:
        variables: environment variables before the command, such as "NAME=VALUE ".
    """
    install = f"{variables}{sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps"
    return f"run: {install} -e {FOLDER.parent}" if in_sources() else f"run in ddpm_ext's source folder: {install} ."


def installed() -> Path | None:
    """The folder of another ddpm_ext on sys.path that has a compiled module, as after `pip install .`; or None."""
    for folder in map(Path, sys.path):
        package = folder / FOLDER.name
        if package.resolve() != FOLDER and PathFinder.find_spec(NAME, [str(package)]) is not None:
            return package
    return None


def missing() -> str:
    """The error message for a missing compiled module."""
    python = ".".join(map(str, sys.version_info[:2]))
    message = f"ddpm_ext has no compiled module for Python {python} in {FOLDER}; {mend()}"
    installed_package = installed() if in_sources() else None
    if installed_package is None:
        return message
    return (
        f"ddpm_ext: you stand in the source folder {FOLDER.parent}, whose sources are not compiled and hide what is "
        f"installed in {installed_package}; run Python in another folder (cd ..), or to use the sources, {mend()}"
    )


def describe(version: str, cuda: str | None) -> str:
    """A build of torch in words, from its version and its version of CUDA."""
    return f"torch {version} {f'with CUDA {cuda}' if cuda else 'without CUDA'}"


def is_compatible_with(built: dict[str, Any]) -> bool:
    """Whether the module, built for the versions in `built`, can run with this torch.

    Torch's C++ interface changes with each minor version, and CUDA's libraries with each major version.
    """
    if built["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        return False
    if built["cuda"] is None:
        return True
    return torch.version.cuda is not None and built["torch_cuda"].split(".")[0] == torch.version.cuda.split(".")[0]


def load() -> tuple[ModuleType, dict[str, Any]]:
    """The compiled module and `BUILT`. Raises ImportError if it is missing, damaged, or built for another torch."""
    # PathFinder searches this package's folder only. A plain import could load the module of another copy of ddpm_ext
    # that has an editable install, since the import hook of such an install ignores the folder.
    spec = PathFinder.find_spec(NAME, sys.modules["ddpm_ext"].__path__)
    if spec is None or spec.origin is None:
        raise ImportError(missing(), name=NAME)
    try:
        built = json.loads(Path(spec.origin).with_suffix(".json").read_text())
        is_compatible = is_compatible_with(built)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        text = f"ddpm_ext's compiled module does not say what it was built for; {mend()}"
        raise ImportError(text, name=NAME) from None
    if not is_compatible:
        built_for, running = (
            describe(built["torch"], built["torch_cuda"]),
            describe(torch.__version__, torch.version.cuda),
        )
        raise ImportError(f"ddpm_ext was compiled for {built_for} and this is {running}; {mend()}", name=NAME)
    try:
        return importlib.import_module(NAME), built
    except ImportError as error:
        raise ImportError(f"ddpm_ext's compiled module does not load ({error}); {mend()}", name=NAME) from None


C, BUILT = load()
