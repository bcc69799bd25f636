"""Optional packages, imported where they are used; a missing one ends in the command that installs it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = ["MissingExtra", "counter", "require"]

_INSTALLS = {"sklearn": "scikit-learn", "PIL": "pillow"}


class MissingExtra(ImportError):
    """An optional package is needed and not installed."""


def require(module: str, purpose: str) -> ModuleType:
    """Imports `module` and returns it; raises MissingExtra, with the pip command, if it isn't installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # installed, but something that it needs is not: that package's own message says more
        package = _INSTALLS.get(top, top)
        raise MissingExtra(f'{purpose} needs {package}: pip install "ddpm-ext[demo]"') from None


def counter(count: int, what: str) -> Iterable[int]:
    """range(count), with a progress bar where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return range(count)
    return tqdm(range(count), desc=what, total=count)
