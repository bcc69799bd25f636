"""Optional packages, imported where they are used. The error for a missing one has the command that installs it."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

ALL_EXTRAS = ', or for all commands, in ddpm_ext\'s source folder, pip install --no-build-isolation ".[demo]"'
_told = False  # that tqdm would show a progress bar
_INSTALLS = {"sklearn": "scikit-learn", "PIL": "pillow"}


class MissingExtra(ImportError):
    """An optional package is needed but not installed."""


def require(module: str, purpose: str, *, in_demo: bool = True) -> ModuleType:
    """Imports and returns a module. Raises MissingExtra, with the pip command, if its package is not installed, or a
    package that this one imports.

    Args:
        purpose: what it is needed for, as the start of the error's sentence.
        in_demo: whether the extra "demo" installs it, which the error then says.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        tops = (name.partition(".")[0] for name in (module, error.name))
        package, missing = (_INSTALLS.get(top, top) for top in tops)
        inner = "" if missing == package else f", which needs {missing}, which is not installed"
        others = ALL_EXTRAS if in_demo else ""
        raise MissingExtra(f"{purpose} needs {package}{inner}: pip install {package}{others}") from None


def counter(count: int, what: str | None, disable: bool | None = None) -> Iterable[int]:
    """range(count), with a progress bar labelled `what` if tqdm is installed; disable is tqdm's, None: where standard
    error is no terminal."""
    if disable or not has_bars():
        return range(count)
    from tqdm.auto import tqdm

    return tqdm(range(count), desc=what, total=count, disable=disable)


@contextlib.contextmanager
def calls_bar(most: int, what: str, shown: bool) -> Iterator[Callable[..., object]]:
    """A function to call after each of at most `most` calls, or with their number after several; if `shown` and tqdm is
    installed, it moves a progress bar labelled `what`."""
    if not (shown and has_bars()):
        yield lambda *_: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=most, desc=what, disable=None) as bar:
        yield bar.update


def has_bars(*, tell: bool = True) -> bool:
    """Whether tqdm is installed; if not, and `tell`, a line on a terminal says once what would show a progress bar."""
    global _told
    try:
        importlib.import_module("tqdm.auto")
    except ImportError:
        if tell and not _told and sys.stderr is not None and sys.stderr.isatty():
            print("no progress bar without tqdm: pip install tqdm", file=sys.stderr)
            _told = True
        return False
    return True
