"""Column, the type with which StepTable declares its columns, and the checks of a column's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddpm_ext.base import checks

Values = Tensor | npt.ArrayLike
Array = npt.NDArray[Any]


class Column:
    """The type of StepTable's fields for columns. A field's default is one of the three constants below the class.

    For type checkers, a column is a descriptor: one assigns Values and reads a Tensor. At run time, a column is an
    ordinary attribute, and the dataclass calls __get__ only to get the field's default.
    """

    def __init__(self, *, needed: bool = False) -> None:
        self._needed = needed

    def __get__(self, table: object, owner: type | None = None) -> Tensor:
        if self._needed or table is not None:
            raise AttributeError("a column has values in a StepTable alone")
        return cast(Tensor, None)

    if TYPE_CHECKING:

        def __set__(self, table: object, values: Values | None) -> None: ...


NEEDED = Column(needed=True)  # has no default
OPTIONAL = Column()  # the default None means zeros, except for draw
NOT_PLAIN = Column()  # the default None means zeros; the plain step can't compute rows with another number


def numbers(name: str, values: Values, rows: int | None = None) -> Array:
    """A copy of a column's values, (rows,): int64 for integers, float64 for floats.

    Args:
        rows: the expected number of rows. None accepts any number from 1 up.

    Raises:
        TypeError: values that are not numbers, or not integers for draw.
        ValueError: a wrong shape, an integer of 2^63 or more, or a number that is not finite.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    elif isinstance(values, list | tuple) and any(isinstance(value, bool) for value in values):
        raise TypeError(f"{name} holds a bool, expected numbers")  # numpy would turn a bool among floats into 1.0
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is not 1-dimensional: {error}") from None
    if array.dtype.kind not in ("iu" if name == "draw" else "iuf") and array.size:
        other_types = [type(value).__name__ for value in array.flat if not isinstance(value, int | float)]
        if array.dtype == object and not other_types:
            raise ValueError(f"{name} holds {max(array.flat, key=abs)}, expected numbers below 2^63")
        kind = other_types[0] if array.dtype == object else array.dtype
        raise TypeError(f"{name} holds {kind}, expected {'integers' if name == 'draw' else 'real numbers'}")
    if rows is None:
        if array.ndim != 1 or not array.size:
            raise ValueError(f"{name} has shape {array.shape}, expected (rows,) with at least 1 row")
    elif array.shape != (rows,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({rows},), one a row as timestep")
    if array.dtype.kind == "u" and (array > 2**63 - 1).any():
        raise ValueError(f"{name} holds {array.max()}, expected numbers below 2^63")
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    checks.refuse(name, array, ~np.isfinite(array), "finite numbers")
    return array


def default_draws(timestep: Array) -> Array:
    """The default draws of a table, by the rule in StepTable's docstring.

    Raises:
        ValueError: a timestep so large that its draw would not be below 2^32.
    """
    if (timestep < 0).any() or (timestep % 1 != 0).any():
        return np.arange(len(timestep), dtype=np.int64)
    order = np.argsort(timestep, kind="stable")
    ordered, visits = timestep[order], np.empty(len(timestep), np.int64)
    visits[order] = np.arange(len(timestep)) - np.searchsorted(ordered, ordered)
    period = int(timestep.max()) + 1
    draws = timestep + visits * float(period)  # exact up to 2^53
    if draws.max() >= 2**32:
        i = int((draws >= 2**32).argmax())
        draw = int(timestep[i]) + int(visits[i]) * period
        raise ValueError(
            f"timestep[{i}] is {timestep[i]}, which would draw noise {draw}, expected 0 <= draw < 2^32: give draw"
        )
    return draws.astype(np.int64)


def check_float32(name: str, values: Array) -> None:
    """Raises ValueError if a number is beyond the range of float32."""
    with np.errstate(over="ignore"):
        beyond = np.flatnonzero(np.isinf(values.astype(np.float32)))
    if beyond.size:
        i = beyond[0]
        raise ValueError(f"{name}[{i}] is {values[i]:.6g}, expected numbers within float32 (backend='reference')")
