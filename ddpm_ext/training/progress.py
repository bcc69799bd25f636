"""The progress of a run: a bar with the loss, lines of text above the bar, and the speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ddpm_ext.base.optional import require

_LOSS_DECAY = 0.98  # the decay of the displayed moving average of the loss, in each step


class Bar:
    """A progress bar over steps, with a moving average of the loss. shown: the tqdm bar, or None to show nothing.

    On a GPU or with several ranks, the displayed loss changes only when the log reads losses: reading each step's loss
    would make the host wait for each step.
    """

    def __init__(self, shown: Any = None) -> None:
        self._shown = shown
        self._sum = self._weight = 0.0

    def advance(self) -> None:
        """Counts a step."""
        if self._shown is not None:
            self._shown.update()

    def show(self, losses: Iterable[float]) -> None:
        """Updates the displayed moving average. losses: the losses of the steps since the last call."""
        for loss in losses:
            self._sum = _LOSS_DECAY * self._sum + (1 - _LOSS_DECAY) * loss
            self._weight = _LOSS_DECAY * self._weight + (1 - _LOSS_DECAY)
        if self._shown is not None and self._weight:
            self._shown.set_postfix_str(f"loss {self._sum / self._weight:.4f}", refresh=False)


@contextmanager
def progress_bar(steps: int, steps_done: int, *, shown: bool) -> Iterator[Bar]:
    """A bar over `steps` steps, of which `steps_done` are done. If `shown` is false, the bar displays nothing."""
    if not shown:
        yield Bar()
        return
    tqdm = require("tqdm", "the progress bar").tqdm
    with tqdm(total=steps, initial=steps_done, desc="training", unit="step", disable=None) as bar:
        yield Bar(bar)


def above_bar(report: Callable[[str], None]) -> Callable[[str], None]:
    """Wraps a report function so that its lines appear above the bar."""

    def write(text: str) -> None:
        with require("tqdm", "the progress bar").tqdm.external_write_mode():
            report(text)

    return write


class Clock:
    """Measures the speed of training. step: the number of steps taken so far."""

    def __init__(self, step: int) -> None:
        self.step, self.time_of_step = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        """The steps per second since the last call. step: the number of steps taken so far."""
        now = time.monotonic()
        rate = (step - self.step) / max(now - self.time_of_step, 1e-9)
        self.step, self.time_of_step = step, now
        return rate
