"""What a user names as "module:name" at the command line: a function of features, or what makes a network."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any


def import_by_name(name: str, option: str, expected: str, kind: str) -> Callable[..., Any]:
    """The function or class that "module:name" names; its module is imported.

    Args:
        option: with which messages begin.
        expected: the form of `name`, for messages. kind: of what is expected, as "a function".

    Raises:
        ValueError: there is none.
    """
    module, _, inner = name.partition(":")
    if not module or not inner:
        raise ValueError(f"{option}: got {name}, expected {expected}")
    try:
        found = operator.attrgetter(inner)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}: {name} can't be imported ({error}), expected {expected}") from error
    if not callable(found):
        raise ValueError(f"{option}: {name} is a {type(found).__name__}, expected {kind}")
    return found


def name_of(given: Callable[..., Any]) -> str:
    """The "module:name" of a function or a class; of any other object, that of its class."""
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}:{named.__qualname__}"
