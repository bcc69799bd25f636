"""Ctrl-C and SIGTERM in training: the first is noted, so that the run can save its state; a second one ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_BEHIND = 1.0  # seconds by which a signal to all processes of a run may reach this one later than a worker
# Only these handlers are replaced: whoever set another one has plans of their own.
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Interrupted(BaseException):
    """A signal came while a batch was awaited."""


class NotedSignal:
    """Which signal has come. number: its number; 0: none."""

    def __init__(self) -> None:
        self.number, self._waiting = 0, False

    def next(self, read: Iterator[T]) -> T | None:
        """The next of `read`, or None if a signal comes first: it may have killed the workers, which then give none.

        The ChildProcessError of a worker that died is raised only after a moment. If the worker died of a signal to all
        processes of the run, the signal comes here meanwhile, and None is returned.
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
        """Called by the signal's handler."""
        self.number = number
        if self._waiting:
            raise _Interrupted


@contextmanager
def noted_signals() -> Iterator[NotedSignal]:
    """Within the block the first Ctrl-C or SIGTERM is noted, and has no other effect.

    After it both have their usual effect again, so that a second one ends the run, and until the end of the block the
    death of a child process is ignored. Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    noted, before = NotedSignal(), dict[signal.Signals, Any]()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        # The signal may also have killed a DataLoader's workers, for which torch's handler would raise an error.
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
    """Ends the program as the signal would have: by KeyboardInterrupt or by SystemExit with the shell's code for it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
