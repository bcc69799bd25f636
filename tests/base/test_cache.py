"""The cache that threads share: it keeps the latest values, and all threads get the same one."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddpm_ext.base.cache import BoundedCache


def test_the_oldest_value_goes():
    """By when it was stored, not by when it was read."""
    cache = BoundedCache(2)
    assert cache.get_or_make("a", lambda: 1) == 1 and cache.get_or_make("b", lambda: 2) == 2
    assert cache.get_or_make("a", lambda: 9) == 1 and cache.get_or_make("c", lambda: 3) == 3
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache)) == (None, 2, 3, 2)
    with pytest.raises(ZeroDivisionError):  # where making fails nothing is stored
        cache.get_or_make("d", lambda: 1 // 0)
    assert len(cache) == 2 and cache.get_or_make("d", lambda: 1) == 1
    assert cache.get_or_make("e", lambda: cache.get_or_make("f", lambda: 1) + 1) == 2  # making may use the cache
    with pytest.raises(ValueError, match="size is 0, expected 1 or more"):
        BoundedCache(0)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_empty(how):
    cache = BoundedCache(3)
    cache.get_or_make("a", lambda: 1)
    copied = how(cache)
    assert (len(copied), copied.size, len(cache)) == (0, 3, 1)


def test_threads_get_the_value_that_was_stored_first():
    """Also where all of them make one at the same time."""
    cache, barrier = BoundedCache(4), threading.Barrier(8)

    def make():
        barrier.wait()  # every thread is in here before any of them stores
        return object()

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: cache.get_or_make("a", make), range(8))]
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_threads_never_exceed_the_size_or_see_another_keys_value():
    cache, stop = BoundedCache(3), time.monotonic() + 0.3

    def work(key):
        while time.monotonic() < stop:
            key = (key + 1) % 7
            assert cache.get_or_make(key, lambda key=key: (key,)) == (key,) and cache.get(key) in (None, (key,))
            assert len(cache) <= 4  # one is added before the oldest goes

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(cache) <= 3
