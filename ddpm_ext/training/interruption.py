"""Ctrl-C and SIGTERM in training: the first is noted, so that the run can save its state; a second one ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

__all__ = ["Noted", "end", "noted_signals"]

T = TypeVar("T")

_BEHIND = 1.0  # seconds: how long a signal to all processes of a run may take from a worker to this one
# Only these handlers are replaced: whoever set another one has plans of their own.
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Interrupted(BaseException):
    """A signal came while a batch was awaited."""


class Noted:
    """The signal that has come. number: its number, or 0."""

    def __init__(self) -> None:
        self.number, self._waiting = 0, False

    def next(self, read: Iterator[T]) -> T | None:
        """The next of `read`, or None if a signal comes before it: workers that the signal killed would give none.

        A worker's death, a ChildProcessError, is raised a moment later, since the signal that ended it may come then.
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
def noted_signals() -> Iterator[Noted]:
    """Notes the first signal that comes in the block.

    After it both have their usual effect again, and the end of a child process has none. Outside of the main thread,
    where Python allows no handlers, all have it all the time.
    """
    noted, before = Noted(), dict[signal.Signals, Any]()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        # The workers of a DataLoader may get the signal, too. Its handler would raise an error for their end.
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
