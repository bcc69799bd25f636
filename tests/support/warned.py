"""The warnings that a test expects among those that were caught."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


def user_warnings(caught: Iterable[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """Only UserWarnings: objects left open by earlier tests may cause a ResourceWarning at any moment."""
    return [warning for warning in caught if warning.category is UserWarning]
