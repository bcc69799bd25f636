"""Times an element that a kernel can't go below on a card: by its bytes, and by every pipe it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.static.cards import RATES, Card
from benchmarks.static.pipes import WIDE, load
from benchmarks.static.sass import Instruction


class Roofline(NamedTuple):
    """Picoseconds an element."""

    memory: float
    pipes: dict[str, float]

    @property
    def busiest(self) -> str:
        return max(self.pipes, key=lambda pipe: self.pipes[pipe])

    @property
    def compute(self) -> float:
        return self.pipes[self.busiest]

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.compute else self.busiest

    @property
    def floor(self) -> float:
        return max(self.memory, self.compute)

    @property
    def ratio(self) -> float:
        """The busiest pipe's time over memory's: below 1 the kernel is bound by memory."""
        return self.compute / self.memory


def roofline(
    card: Card, issued: Mapping[Instruction, float], elements: int, bytes_an_element: float, wide: int = WIDE
) -> Roofline:
    """Of a kernel whose threads each issue those instructions, so many times, for so many elements."""
    busy = dict.fromkeys(RATES[card.arch], 0.0)
    for instruction, times in issued.items():
        for pipe, cost in load(instruction, card.arch, wide).items():
            busy[pipe] += times * cost
    clocks = {pipe: busy[pipe] / elements / rate for pipe, rate in RATES[card.arch].items()}
    return Roofline(
        bytes_an_element / card.bandwidth * 1e3,
        {pipe: clock / (card.sms * card.clock) * 1e3 for pipe, clock in clocks.items()},
    )
