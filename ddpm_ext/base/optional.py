"""Optional packages, imported when they are used. The error for a missing package has the command that installs it."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

ALL_EXTRAS = ', or for all commands, in ddpm_ext\'s source folder, pip install --no-build-isolation ".[demo]"'
_tqdm_reported = False  # whether the line about a missing tqdm was printed
_INSTALLS = {"sklearn": "scikit-learn", "PIL": "pillow"}  # {module: package}, where pip's name differs


class MissingExtra(ImportError):
    """An optional package is needed but not installed."""


def require(module: str, purpose: str, *, in_demo: bool = True) -> ModuleType:
    """Imports and returns a module.

    Args:
        purpose: what needs the module: the first words of the error's text.
        in_demo: whether the extra "demo" installs the module's package. The error then says so.

    Raises:
        MissingExtra: the package, or a package that it imports, is not installed. The error has the pip command.
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
    """range(count), with a progress bar if tqdm is installed.

    Args:
        what: the label of the bar.
        disable: True shows no bar, False a bar, None a bar in a notebook or if standard error is a terminal, as in
            tqdm.auto.
    """
    if disable or not has_bars():
        return range(count)
    from tqdm.auto import tqdm

    return tqdm(range(count), desc=what, total=count, disable=disable)


@contextlib.contextmanager
def calls_bar(most: int, what: str, shown: bool) -> Iterator[Callable[..., object]]:
    """Yields a function that advances a progress bar over the calls of a model, by 1 or by the number that it gets.

    If `shown` is False or tqdm is not installed, the function does nothing.

    Args:
        most: the number of calls at which the bar is full.
        what: the label of the bar.
    """
    if not (shown and has_bars()):
        yield lambda *_: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=most, desc=what, disable=None) as bar:
        yield bar.update


def has_bars(*, tell: bool = True) -> bool:
    """Whether tqdm is installed. If not, and with `tell`, a line on a terminal says once how to install it."""
    global _tqdm_reported
    try:
        importlib.import_module("tqdm.auto")
    except ImportError:
        if tell and not _tqdm_reported and sys.stderr is not None and sys.stderr.isatty():
            print("no progress bar without tqdm: pip install tqdm", file=sys.stderr)
            _tqdm_reported = True
        return False
    return True
