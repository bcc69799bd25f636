"""Searches the timesteps of a tuned table: the three parameters of `spaced` for which the table's error is smallest."""

from __future__ import annotations

from collections.abc import Callable

import torch

Timesteps = tuple[int, ...]
STARTS = ((1.0, 2.0, 0.002), (0.9, 1.2, 0.01))  # where searches begin: the arguments largest, power, smallest of spaced
# The first changes of the three arguments. A search ends when it has reduced them to LEAST times their size or less.
STRIDES, LEAST = (0.06, 0.4, 0.008), 0.2
POWERS = (0.3, 10.0)  # the least and the largest value of power
# About the most evaluations of the error for each start. The second start may also use those that the first left over.
EVALUATIONS = 60
# The most results, and how far two results must differ in some timestep, as a share of the schedule.
FOUND, APART = 3, 0.04


def spaced(timesteps: int, steps: int, largest: float, power: float, smallest: float) -> Timesteps:
    """Descending timesteps whose roots of degree `power` are evenly spaced, like the sigmas of Karras et al. 2022,
    eq. 5.

    Args:
        timesteps: the schedule's number of timesteps.
        steps: the number of timesteps in the result, at most `timesteps`.
        largest, smallest: the first and the last of them, as shares of the schedule's last timestep, in [0, 1].
        power: above 0. The larger it is, the more timesteps are near the smallest.
    """
    high, low = (share * (timesteps - 1) for share in (largest, smallest))
    along = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    roots = high ** (1 / power) + along * (low ** (1 / power) - high ** (1 / power))
    rounded = (roots**power).round().long().tolist()
    for i in range(steps - 1, -1, -1):  # make them distinct, and keep them in the schedule's range
        rounded[i] = max(rounded[i], rounded[i + 1] + 1 if i + 1 < steps else 0)
    return tuple(min(t, timesteps - 1 - i) for i, t in enumerate(rounded))


def search(error: Callable[[Timesteps], float], timesteps: int, steps: int) -> list[Timesteps]:
    """Up to FOUND lists of timesteps, the smallest error first, without lists that are too similar to a better one.

    From each start, the search changes one of the three parameters by a stride if this reduces the error. If no such
    change reduces the error, it halves the strides.

    Args:
        error: error(timesteps) is the error of a table with these timesteps.
        timesteps, steps: see spaced.
    """
    error_of: dict[Timesteps, float] = {}

    def try_numbers(numbers: tuple[float, float, float]) -> float:
        candidate = spaced(timesteps, steps, *numbers)
        if candidate not in error_of:
            error_of[candidate] = error(candidate)
        return error_of[candidate]

    for count, start in enumerate(STARTS, start=1):
        numbers, scale = start, 1.0
        best = try_numbers(numbers)
        while scale > LEAST and len(error_of) < count * EVALUATIONS:
            moved = _improved(try_numbers, numbers, scale, best)
            if moved is None:
                scale /= 2
            else:
                numbers, best = moved, try_numbers(moved)
    results: list[Timesteps] = []
    for candidate in sorted(error_of, key=lambda candidate: error_of[candidate]):
        if all(
            max(abs(x - y) for x, y in zip(candidate, better, strict=True)) > APART * timesteps for better in results
        ):
            results.append(candidate)
    return results[:FOUND]


def _improved(
    try_numbers: Callable[[tuple[float, float, float]], float],
    numbers: tuple[float, float, float],
    scale: float,
    best: float,
) -> tuple[float, float, float] | None:
    """`numbers` with one of them changed by its stride times `scale`: the first that reduces the error `best` by more
    than a thousandth, or None.
    """
    for parameter, stride in enumerate(STRIDES):
        for sign in (1, -1):
            moved = list(numbers)
            moved[parameter] += sign * scale * stride
            largest, power, smallest = moved
            largest, power = min(largest, 1.0), min(max(power, POWERS[0]), POWERS[1])
            smallest = max(smallest, 0.0)
            if smallest < largest and try_numbers((largest, power, smallest)) < 0.999 * best:
                return largest, power, smallest
    return None
