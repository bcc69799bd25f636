"""Ctrl-C and SIGTERM in training: the first is noted, so that the run can save its state; a second one ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["end", "noted_signals"]

# Only these handlers are replaced: whoever set another one has plans of their own.
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """A function that returns the number of the signal that has come in the block, or 0.

    After the first signal both have their usual effect again, and the end of a child process has none. Outside of the
    main thread, where Python allows no handlers, all have it all the time.
    """
    came, before = [0], dict[signal.Signals, Any]()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        came[0] = number
        restore()
        # The workers of a DataLoader may get the signal, too. Its handler would raise an error for their end.
        if hasattr(signal, "SIGCHLD"):
            before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL

    if threading.current_thread() is threading.main_thread():
        for number, usual in _USUAL.items():
            if signal.getsignal(number) == usual:
                before[number] = signal.signal(number, note)
    try:
        yield lambda: came[0]
    finally:
        restore()


def end(number: int) -> NoReturn:
    """Ends the program as the signal would have: by KeyboardInterrupt or by SystemExit with the shell's code for it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
