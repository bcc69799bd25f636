"""What a user names as "module:name" at the command line: a function of features, or what makes a network."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NOT_THEIRS = (str(Path(__file__).resolve().parents[1]), str(importlib.__file__), "<frozen importlib")


class UserCodeError(Exception):
    """What the user has named raised an exception: the cause, whose traceback begins in their code."""


def theirs(option: str, name: str, error: Exception) -> UserCodeError:
    """What is raised from an exception of what the user has named, whose traceback loses the lines of this package."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_code.co_filename.startswith(_NOT_THEIRS):
        where = where.tb_next
    error.__traceback__ = where
    return UserCodeError(f"{option}: {name} raised {type(error).__name__}")


def import_by_name(name: str, option: str, expected: str, kind: str) -> Callable[..., Any]:
    """The function or class that "module:name" names; its module is imported.

    Args:
        option: with which messages begin.
        expected: the form of `name`, for messages. kind: of what is expected, as "a function".

    Raises:
        ValueError: there is none. UserCodeError: the module raises an exception.
    """
    module, _, inner = name.partition(":")
    if not module or not inner:
        raise ValueError(f"{option}: got {name}, expected {expected}")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{option}: {name} can't be imported ({error}), expected {expected}") from error
    except Exception as error:
        raise theirs(option, module, error) from error
    try:
        found = operator.attrgetter(inner)(imported)
    except AttributeError as error:
        raise ValueError(f"{option}: {name} can't be imported ({error}), expected {expected}") from error
    if not callable(found):
        raise ValueError(f"{option}: {name} is a {type(found).__name__}, expected {kind}")
    return found


def name_of(given: Callable[..., Any]) -> str:
    """The "module:name" of a function or a class; of any other object, that of its class."""
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}:{named.__qualname__}"
