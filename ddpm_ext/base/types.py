"""Types that several packages use in their signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Clip = tuple[float, float]
"""The range (low, high) that the predicted clean sample is clipped to."""

Model = Callable[..., Any]
"""A denoiser: model(x_t, t, ...) returns a tensor of x_t's shape, or an object that has one as `.sample`."""
