"""BoundedCache, a cache with a maximum size that threads may share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """A cache of at most `size` values by key. A new value in a full cache replaces the value that was added first.

    Threads may share the cache. A lookup of an existing key takes no lock. Copies and pickles of a cache are empty.

    Raises:
        ValueError: size is below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, expected 1 or more")
        self.size = size
        self._values: dict[Hashable, Value] = {}
        self._lock = threading.Lock()
        self.get: Callable[[Hashable], Value | None] = self._values.get
        """The value of a key, or None."""

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,)

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key. For a missing key, calls make() and stores its result, which must not be None.

        make() runs without the lock, so it may use the cache. If several threads call make() for the same key at the
        same time, all get the value that was stored first. If make() raises an error, nothing is stored.
        """
        value = self._values.get(key)
        if value is not None:
            return value
        new_value = make()
        with self._lock:
            value = self._values.setdefault(key, new_value)
            while len(self._values) > self.size:
                del self._values[next(iter(self._values))]
        return value
