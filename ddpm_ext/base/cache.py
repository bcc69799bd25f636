"""A small cache that threads may share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key, at most `size` of them: a new one takes the place of the oldest.

    Threads may share it. A lookup that finds its value takes no lock. Copies and pickles of it are empty.

    Raises ValueError: size is below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, expected 1 or more")
        self.size = size
        self._values: dict[Hashable, Value] = {}
        self._lock = threading.Lock()
        self.get: Callable[[Hashable], Value | None] = self._values.get
        """The key's value, or None where it has none."""

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,)

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The key's value; where it has none, make(), which is stored and must not be None.

        make() runs without the lock, so it may use the cache itself. Threads that make a value for one key at the same
        time all get the one that was stored first. What make() raises is passed on, and nothing is stored.
        """
        found = self._values.get(key)
        if found is not None:
            return found
        made = make()
        with self._lock:
            found = self._values.setdefault(key, made)
            while len(self._values) > self.size:
                del self._values[next(iter(self._values))]
        return found
