"""Which timesteps a tuned table has: a search over a family with three numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch

Timesteps = tuple[int, ...]
STARTS = ((1.0, 2.0, 0.002), (0.9, 1.2, 0.01))  # largest, power, smallest: the ends as shares of the schedule
STRIDES, LEAST = (0.06, 0.4, 0.008), 0.2  # the first strides, and how far they shrink
POWERS = (0.3, 10.0)
EVALUATIONS = 60  # at most, from each start
FOUND, APART = 3, 0.04  # how many timesteps are found, and how far apart, as a share of the schedule


def spaced(timesteps: int, steps: int, largest: float, power: float, smallest: float) -> Timesteps:
    """Descending timesteps whose roots of degree `power` are evenly spaced, as the sigmas of Karras et al. 2022, eq. 5.

    Args:
        timesteps: of the schedule.
        steps: how many; at most `timesteps`.
        largest, smallest: the ends, as shares of the schedule's last timestep, in [0, 1].
        power: above 0: the larger, the more timesteps are near the smallest.
    """
    high, low = (share * (timesteps - 1) for share in (largest, smallest))
    along = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    roots = high ** (1 / power) + along * (low ** (1 / power) - high ** (1 / power))
    found = (roots**power).round().long().tolist()
    for i in range(steps - 1, -1, -1):  # none twice, and none beyond the ends
        found[i] = max(found[i], found[i + 1] + 1 if i + 1 < steps else 0)
    return tuple(min(t, timesteps - 1 - i) for i, t in enumerate(found))


def search(error: Callable[[Timesteps], float], timesteps: int, steps: int) -> list[Timesteps]:
    """The timesteps with the smallest error, then the next best that differ from them: from each start, a stride in one
    of the three numbers is taken where it helps; where none does, strides are halved.

    Args:
        error: of a table with these timesteps.
        timesteps: of the schedule. steps: as of spaced.
    """
    known: dict[Timesteps, float] = {}

    def try_numbers(numbers: tuple[float, float, float]) -> float:
        at = spaced(timesteps, steps, *numbers)
        if at not in known:
            known[at] = error(at)
        return known[at]

    for count, start in enumerate(STARTS, start=1):
        numbers, shrunk = start, 1.0
        best = try_numbers(numbers)
        while shrunk > LEAST and len(known) < count * EVALUATIONS:
            moved = _improved(try_numbers, numbers, shrunk, best)
            if moved is None:
                shrunk /= 2
            else:
                numbers, best = moved, try_numbers(moved)
    found: list[Timesteps] = []
    for at in sorted(known, key=lambda at: known[at]):
        if all(max(abs(x - y) for x, y in zip(at, own, strict=True)) > APART * timesteps for own in found):
            found.append(at)
    return found[:FOUND]


def _improved(
    try_numbers: Callable[[tuple[float, float, float]], float],
    numbers: tuple[float, float, float],
    shrunk: float,
    best: float,
) -> tuple[float, float, float] | None:
    """Numbers beside these whose error is smaller; None where there are none."""
    for which, stride in enumerate(STRIDES):
        for sign in (1, -1):
            moved = list(numbers)
            moved[which] += sign * shrunk * stride
            largest, power, smallest = moved
            largest, power = min(largest, 1.0), min(max(power, POWERS[0]), POWERS[1])
            smallest = max(smallest, 0.0)
            if smallest < largest and try_numbers((largest, power, smallest)) < 0.999 * best:
                return largest, power, smallest
    return None
