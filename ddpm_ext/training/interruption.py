"""Ctrl-C and SIGTERM in training: the first signal is noted, so that the run can save its state. The second ends it."""

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
    """A signal arrived while this process waited for a batch."""


class NotedSignal:
    """The signal that has arrived. number: the signal's number, or 0 if none has arrived."""

    def __init__(self) -> None:
        self.number, self._waiting = 0, False

    def next(self, read: Iterator[T]) -> T | None:
        """The next element of `read`, or None if a signal arrives first.

        If a worker died, its ChildProcessError is raised after a short wait. If a signal to all processes of the run
        killed the worker, the signal arrives in this process during the wait, and None is returned.
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
        """The signal handler calls this."""
        self.number = number
        if self._waiting:
            raise _Interrupted


@contextmanager
def noted_signals() -> Iterator[NotedSignal]:
    """Within the block, the first Ctrl-C or SIGTERM is noted and has no other effect.

    After this signal, both signals have their default effect again, so that a second signal ends the run. From then
    until the end of the block, the death of a child process is ignored. Outside of the main thread, this context
    manager does nothing, since Python allows no signal
    handlers there.
    """
    noted, handlers_before = NotedSignal(), dict[signal.Signals, Any]()

    def restore() -> None:
        while handlers_before:
            signal.signal(*handlers_before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        # The signal may also have killed a DataLoader's workers. Torch's SIGCHLD handler would raise an error for that.
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
    """Ends the program like the signal `number` does: by KeyboardInterrupt, or by SystemExit with the code that shells
    report for the signal."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
