"""Checks of eta, the factor of a sampler's noise, and of whether a sampler has it as a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ddpm_ext.base import checks


def check_eta(eta: object) -> float:
    """`eta` as a float.

    Raises:
        TypeError: `eta` is not a number. ValueError: `eta` is negative or not finite.
    """
    return checks.nonnegative("eta", eta)


def takes_eta(sampler: Callable[..., object]) -> bool:
    """Whether `sampler`, a function of SAMPLERS, has a parameter eta."""
    return "eta" in inspect.signature(sampler).parameters


def eta_argument(sampler: Callable[..., object], eta: float | None) -> dict[str, float]:
    """The keyword arguments that pass an option `eta` to `sampler`, a function of SAMPLERS.

    Args:
        eta: finite, >= 0, or None for the sampler's default. For a sampler without eta, 0 is accepted as well.

    Returns:
        {"eta": eta}, or {} if the sampler has no eta or `eta` is None.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative, not finite, or above 0 for a sampler without eta.
    """
    if eta is None:
        return {}
    eta = check_eta(eta)
    if takes_eta(sampler):
        return {"eta": eta}
    if eta != 0:
        raise ValueError(f"eta is {eta}, but sampler {sampler.__name__!r} has none, expected None")
    return {}
