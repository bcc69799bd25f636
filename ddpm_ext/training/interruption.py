"""Ctrl-C and SIGTERM in training: the first signal is noted, so that the run can save its state. A second ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_BEHIND = 1.0  # a signal to all processes of a run may reach this process up to this many seconds later than a worker
# The default handlers, which are replaced. A handler that the caller has installed stays.
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Interrupted(BaseException):
    """A signal arrived while a batch was awaited."""


class NotedSignal:
    """The signal that has arrived. number: its number; 0: no signal."""

    def __init__(self) -> None:
        self.number, self._waiting = 0, False

    def next(self, read: Iterator[T]) -> T | None:
        """The next element of `read`, or None if a signal arrives first: it may have killed the workers as well.

        If a worker died, its ChildProcessError is raised after a short wait. If a signal to all processes of the run
        killed the worker, the signal arrives here during the wait, and None is returned.
        """
        try:
            try:
                self._waiting = True
                return None if self.number else next(read)
            except ChildProcessError:
                time.sleep(_BEHIND)
                raise
            finally:
                self._waiting = False
        except _Interrupted:
            return None

    def note(self, number: int) -> None:
        """The signal's handler calls this."""
        self.number = number
        if self._waiting:
            raise _Interrupted


@contextmanager
def noted_signals() -> Iterator[NotedSignal]:
    """Within the block, the first Ctrl-C or SIGTERM is noted and has no other effect.

    After this signal, both have their usual effect again, so that a second one ends the run; and until the end of the
    block, the death of a child process is ignored. Outside of the main thread nothing changes, since Python allows no
    handlers there.
    """
    noted, before = NotedSignal(), dict[signal.Signals, Any]()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        # The signal may also have killed a DataLoader's workers. Torch's SIGCHLD handler would raise an error for that.
        if hasattr(signal, "SIGCHLD"):
            before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL
        noted.note(number)

    if threading.current_thread() is threading.main_thread():
        for number, usual in _USUAL.items():
            if signal.getsignal(number) == usual:
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


def end(number: int) -> NoReturn:
    """Ends the program as the signal does: by KeyboardInterrupt, or by SystemExit with the shell's code for it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
