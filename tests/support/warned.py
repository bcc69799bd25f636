"""Selects the warnings that tests check."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


def user_warnings(caught: Iterable[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """The UserWarnings among caught warnings.

    Warnings of other categories may come from objects that earlier tests left open.
    """
    return [warning for warning in caught if warning.category is UserWarning]
