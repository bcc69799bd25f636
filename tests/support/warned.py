"""The warnings that a test expects among those that were caught."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


def user_warnings(caught: Iterable[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """Without others: what earlier tests left open may be collected, with a ResourceWarning, at any moment."""
    return [warning for warning in caught if warning.category is UserWarning]
