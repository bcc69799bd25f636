"""Imports a function or class that the user names at the command line, as "module:name"."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Python files whose paths begin with these texts are not the user's code: this package and Python's import system.
_NOT_USER_CODE = (str(Path(__file__).resolve().parents[1]), str(importlib.__file__), "<frozen importlib")


class UserCodeError(Exception):
    """The user's function or module raised an exception, which is the __cause__ of this error.

    The traceback of the __cause__ begins in the user's code.
    """


def user_code_error(option: str, name: str, error: Exception) -> UserCodeError:
    """Makes a UserCodeError for an exception in the user's code, and removes this package's frames from its traceback.

    option, name: the option and the user's "module:name", for the message.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename.startswith(_NOT_USER_CODE):
        frame = frame.tb_next
    error.__traceback__ = frame
    return UserCodeError(f"{option}: {name} raised {type(error).__name__}")


def import_by_name(name: str, option: str, expected: str, kind: str) -> Callable[..., Any]:
    """Imports the function or class that "module:name" names.

    Args:
        option: the option's name, with which error messages begin.
        expected: the expected form of `name`, for error messages.
        kind: the expected kind of object, such as "a function", for error messages.

    Raises:
        ValueError: name is not "module:name", can't be imported, or is not callable.
        UserCodeError: the module raises an exception other than ImportError.
    """
    module, _, path = name.partition(":")
    if not module or not path:
        raise ValueError(f"{option}: got {name}, expected {expected}")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{option}: {name} can't be imported ({error}), expected {expected}") from error
    except Exception as error:
        raise user_code_error(option, module, error) from error
    try:
        imported_object = operator.attrgetter(path)(imported)
    except AttributeError as error:
        raise ValueError(f"{option}: {name} can't be imported ({error}), expected {expected}") from error
    if not callable(imported_object):
        raise ValueError(f"{option}: {name} is a {type(imported_object).__name__}, expected {kind}")
    return imported_object


def name_of(value: Callable[..., Any]) -> str:
    """The "module:name" of a function or class; for any other object, the "module:name" of its class."""
    function_or_class = value if hasattr(value, "__qualname__") else type(value)
    return f"{function_or_class.__module__}:{function_or_class.__qualname__}"
