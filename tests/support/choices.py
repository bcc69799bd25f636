"""Property tests: tests of many inputs, each made by the choices of a `Choose`.

If hypothesis is installed, it makes the choices and reduces an input that fails to a small one. Otherwise they are
random, from fixed seeds, so that these tests need nothing but pytest. With DDPM_EXT_FUZZ=SEED:SECONDS in the
environment, they are random from that seed on, for as long as that: fuzz.py.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

try:
    import hypothesis
    import hypothesis.strategies as st
except ImportError:
    hypothesis = None

T = TypeVar("T")
FUZZ = os.environ.get("DDPM_EXT_FUZZ", "")


class Choose:
    """Random choices."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int, name: str = "") -> int:
        """An integer in [low, high], the two ends more often than the others."""
        return self.random.choice([low, high, *(self.random.randint(low, high) for _ in range(6))])

    def one_of(self, options: Sequence[T], name: str = "") -> T:
        return self.random.choice(options)

    def order(self, count: int, name: str = "") -> list[int]:
        """A permutation of 0 to count - 1."""
        return self.random.sample(range(count), count)

    def several(self, make: Callable[[], T], least: int, most: int, name: str = "") -> list[T]:
        return [make() for _ in range(self.integer(least, most, name))]


class Hypothesis(Choose):
    """The choices of hypothesis, which prints them with their `name` when a test fails."""

    def __init__(self, data: Any) -> None:
        self.draw = data.draw

    def integer(self, low: int, high: int, name: str = "") -> int:
        return self.draw(st.integers(low, high), name)

    def one_of(self, options: Sequence[T], name: str = "") -> T:
        return self.draw(st.sampled_from(options), name)

    def order(self, count: int, name: str = "") -> list[int]:
        return self.draw(st.permutations(range(count)), name)


def seeds(examples: int) -> Iterator[int]:
    """Those of a test's examples."""
    if not FUZZ:
        yield from range(examples)
        return
    first, seconds = FUZZ.split(":")
    end = time.monotonic() + float(seconds)
    for seed in itertools.count(int(first)):
        yield seed
        if time.monotonic() > end:
            return


def for_many(examples: int = 150) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs the test `examples` times, each time with another `choose`. Every run has the same ones."""

    def with_hypothesis(test: Callable[..., None]) -> Callable[..., None]:
        given = hypothesis.given(choose=st.builds(Hypothesis, st.data()))(test)
        return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)(given)

    def without(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for seed in seeds(examples):
                print(f"seed {seed}", flush=True)  # pytest shows it if the test fails
                test(choose=Choose(seed), **fixtures)

        signature = inspect.signature(test)
        others = [parameter for name, parameter in signature.parameters.items() if name != "choose"]
        run.__signature__ = signature.replace(parameters=others)
        return run

    return without if hypothesis is None or FUZZ else with_hypothesis
