"""Helpers of tests that every option has an effect: another value changes the result, or raises an error.

Such a test reads the names of the options from a signature, a dataclass or a parser. It has a dictionary with other
values for these names. So the test fails for a new option until the dictionary has a value for it.
"""

import argparse
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch

from ddpm_ext.cli.main import build_parser


class Another(NamedTuple):
    """A value of an option that changes the result.

    beside: other options, which the option needs. The runs with and without the value both have them.
    """

    given: Any
    beside: Any = None


class Same(NamedTuple):
    """A value that does not change the result. why: the reason. beside: as for Another."""

    given: Any
    why: str
    beside: Any = None


class Refused(NamedTuple):
    """A value that raises an error. message: a part of the error's text."""

    given: Any
    message: str


class Elsewhere(NamedTuple):
    """An option that another file tests."""

    file: str


def keywords_of(function, *without):
    """The names of a function's keyword-only parameters, except those in `without`."""
    found = inspect.signature(function).parameters.values()
    return [each.name for each in found if each.kind is each.KEYWORD_ONLY and each.name not in without]


def fields_of(*classes):
    """The names of the constructors' parameters of classes, such as "Guidance.scale"."""
    return [f"{each.__name__}.{name}" for each in classes for name in inspect.signature(each).parameters]


def entries(table, names, kind=object):
    """Pairs (name, entry) for pytest.mark.parametrize: the entries of a dictionary for these names of options.

    An option with a list in the dictionary has several entries. A name without an entry has the entry None. Entries of
    the class Elsewhere are left out.

    kind: the class of the entries to return.
    """
    assert table.keys() <= {*names}, f"values for {sorted(table.keys() - {*names})}, which are no options"
    pairs = []
    for name in names:
        found = table.get(name)
        several = [each for each in (found if isinstance(found, list) else [found]) if not isinstance(each, Elsewhere)]
        pairs += [(name, entry) for entry in several if entry is None or isinstance(entry, kind)]
    return pairs


def check_has_value(name, entry):
    """Checks that an entry of `entries` is not None."""
    assert entry is not None, f"no value for option {name}: add one, or say why it changes nothing"


def equal(one, other):
    """Whether two results are equal. They may be nested lists and dictionaries of arrays and tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def options_of(*command):
    """The names under which the parser stores the options of a command, such as ("plot", "grid")."""
    parser = build_parser()
    for word in command:
        parser = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction)).choices[word]
    return [action.dest for action in parser._actions if action.dest != "help"]
