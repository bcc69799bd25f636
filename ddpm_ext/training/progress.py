"""The progress of a run: a bar with the loss, lines of text above the bar, and the speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ddpm_ext.base.optional import require

_LOSS_DECAY = 0.98  # of the smoothed loss, in each step


class Bar:
    """A progress bar over steps with the smoothed loss. shown: the tqdm bar, or None to show nothing.

    On a GPU or with several ranks, the loss is updated only when the log reads losses, since reading a loss waits until
    its step is computed.
    """

    def __init__(self, shown: Any = None) -> None:
        self._shown = shown
        self._sum = self._weight = 0.0

    def advance(self) -> None:
        """Counts a step."""
        if self._shown is not None:
            self._shown.update()

    def show(self, losses: Iterable[float]) -> None:
        """Updates the displayed moving average. losses: of the steps since the last call."""
        for loss in losses:
            self._sum = _LOSS_DECAY * self._sum + (1 - _LOSS_DECAY) * loss
            self._weight = _LOSS_DECAY * self._weight + (1 - _LOSS_DECAY)
        if self._shown is not None and self._weight:
            self._shown.set_postfix_str(f"loss {self._sum / self._weight:.4f}", refresh=False)


@contextmanager
def progress_bar(steps: int, begun: int, *, shown: bool) -> Iterator[Bar]:
    """A bar over `steps`, of which `begun` are done. If not `shown`, the bar displays nothing."""
    if not shown:
        yield Bar()
        return
    tqdm = require("tqdm", "the progress bar").tqdm
    with tqdm(total=steps, initial=begun, desc="training", unit="step", disable=None) as bar:
        yield Bar(bar)


def above_bar(report: Callable[[str], None]) -> Callable[[str], None]:
    """Wraps a report function so that its lines appear above the bar."""

    def write(text: str) -> None:
        with require("tqdm", "the progress bar").tqdm.external_write_mode():
            report(text)

    return write


class Clock:
    """Measures the steps per second between two calls of steps_per_second()."""

    def __init__(self, step: int) -> None:
        self.step, self.time_of_step = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self.step) / max(now - self.time_of_step, 1e-9)
        self.step, self.time_of_step = step, now
        return rate
