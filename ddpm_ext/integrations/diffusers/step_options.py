"""The options of a traced scheduler's steps: what these are called with beside output, timestep and sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

# By their names in order: numbers, strings, None, Beside, and GIVEN for a tensor like the samples.
Options = tuple[tuple[str, Any], ...]


class Beside(NamedTuple):
    """An option that is one of the scheduler's timesteps: so many places after that of the step."""

    places: int


def is_beside(options: Options) -> bool:
    """Whether one of them is another timestep."""
    return any(isinstance(value, Beside) for _, value in options)


def of_steps(options: Options, own: Tensor, first: int, count: int) -> Mapping[str, Any]:
    """Those of `count` steps from a place on, as `follow` takes them. Where a step has no such timestep before or after
    it, that is None. own: the scheduler's timesteps."""
    if not is_beside(options):
        return dict(options)
    times, found = own.tolist(), dict(options)
    for name, value in options:
        if isinstance(value, Beside):
            places = range(first + value.places, first + value.places + count)
            found[name] = [times[i] if 0 <= i < len(times) else None for i in places]
    return found


def at_step(options: Options, place: int, count: int) -> Options:
    """Those of the step at a place, of `count`, without a timestep that is not there."""
    return tuple([each for each in options if not isinstance(each[1], Beside) or 0 <= place + each[1].places < count])
