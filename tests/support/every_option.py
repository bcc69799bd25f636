"""The law "every option arrives": another value of an option changes the result, or an error says why it can't.

A test reads the names of the options from a signature, a dataclass or a parser, and takes other values of them from a
dictionary. So an option that somebody adds fails the test until the dictionary has a value for it.
"""

import argparse
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch

from ddpm_ext.cli.main import build_parser


class Another(NamedTuple):
    """Another value of an option. beside: what the first run has, too, because the option needs it."""

    given: Any
    beside: Any = None


class Same(NamedTuple):
    """A value that leaves the result as it is. why: the reason."""

    given: Any
    why: str
    beside: Any = None


class Refused(NamedTuple):
    """A value that an error refuses. message: a part of its text."""

    given: Any
    message: str


class Elsewhere(NamedTuple):
    """An option that another file tests."""

    file: str


def keywords_of(function, *without):
    """The names of a function's keyword-only options."""
    found = inspect.signature(function).parameters.values()
    return [each.name for each in found if each.kind is each.KEYWORD_ONLY and each.name not in without]


def fields_of(*classes):
    """The names of the arguments of classes, such as "Guidance.scale"."""
    return [f"{each.__name__}.{name}" for each in classes for name in inspect.signature(each).parameters]


def entries(table, names, kind=object):
    """The entries of all options, as pairs for pytest.mark.parametrize. None stands for an entry that is missing.

    kind: the class of the entries that are wanted.
    """
    assert table.keys() <= {*names}, f"values for {sorted(table.keys() - {*names})}, which are no options"
    pairs = []
    for name in names:
        found = table.get(name)
        several = [each for each in (found if isinstance(found, list) else [found]) if not isinstance(each, Elsewhere)]
        pairs += [(name, entry) for entry in several if entry is None or isinstance(entry, kind)]
    return pairs


def check_has_value(name, entry):
    assert entry is not None, f"no value for option {name}: add one, or say why it changes nothing"


def equal(one, other):
    """Whether two results have the same bits. They may be lists, dictionaries, arrays and tensors."""
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
    """The names of a command's options, such as ("plot", "grid"), as its parser stores them."""
    parser = build_parser()
    for word in command:
        parser = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction)).choices[word]
    return [action.dest for action in parser._actions if action.dest != "help"]
