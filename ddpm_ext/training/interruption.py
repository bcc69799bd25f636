"""Ctrl-C and SIGTERM in training. The first signal is only noted: its number is stored, and the training loop later
saves its state and stops. The second signal ends the program at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# Seconds. A signal to all processes of a run may reach this process up to this much later than it reaches a worker.
_SIGNAL_DELAY = 1.0
# Only these default handlers are replaced. A handler that the caller has installed stays.
_DEFAULT_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Interrupted(BaseException):
    """The signal handler raises this if a signal arrives while the process waits for a batch."""


class NotedSignal:
    """Stores the first signal that arrives. number: the signal's number, or 0 as long as no signal has arrived."""

    def __init__(self) -> None:
        self.number, self._waiting = 0, False

    def next(self, read: Iterator[T]) -> T | None:
        """The next element of `read`, or None if a signal arrives first.

        If a worker process died, ChildProcessError is raised after a short wait. The worker may have died of a signal
        to all processes of the run. Then the signal arrives in this process during the wait, and None is returned.
        """
        try:
            try:
                self._waiting = True
                return None if self.number else next(read)
            except ChildProcessError:
                time.sleep(_SIGNAL_DELAY)
                raise
            finally:
                self._waiting = False
        except _Interrupted:
            return None

    def note(self, number: int) -> None:
        """Stores the signal `number`, and ends a wait of next(). The signal handler calls this."""
        self.number = number
        if self._waiting:
            raise _Interrupted


@contextmanager
def noted_signals() -> Iterator[NotedSignal]:
    """Within the block, the first Ctrl-C or SIGTERM only sets the number of the NotedSignal.

    After this signal, both signals have their default effect again, so that a second signal ends the run. The deaths
    of child processes are then ignored until the end of the block. Outside of the main thread, where Python allows no
    signal handlers, no signal is noted.
    """
    noted, handlers_before = NotedSignal(), dict[signal.Signals, Any]()

    def restore() -> None:
        while handlers_before:
            signal.signal(*handlers_before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        # The signal may also have killed a DataLoader's workers. For a dead worker, torch's SIGCHLD handler would raise
        # an error.
        if hasattr(signal, "SIGCHLD"):
            handlers_before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL
        noted.note(number)

    if threading.current_thread() is threading.main_thread():
        for number, default in _DEFAULT_HANDLERS.items():
            if signal.getsignal(number) == default:
                handlers_before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


def end(number: int) -> NoReturn:
    """Ends the program as the signal `number` would.

    Raises KeyboardInterrupt for Ctrl-C. For another signal, raises SystemExit with the exit code that a shell reports
    for a program which the signal has ended.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
