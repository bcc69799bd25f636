"""What is fused of which class, as a table: what `python -m ddpm_ext.integrations` prints."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Support"]


class Support(NamedTuple):
    """Of one method: which options are fused, and which run the library's own code."""

    cls: str
    method: str
    fused: str
    own: str
