"""Property tests: a test runs for many inputs, which it builds from the choices of a `Choose`.

hypothesis makes the choices. They are the same in every run of the tests. hypothesis reduces a failing input to a small
one. With DDPM_EXT_FUZZ=EXAMPLES in the environment, the choices depend on pytest's --hypothesis-seed, and each test
runs for EXAMPLES inputs, but at most twenty times as many as usual. fuzz.py uses this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hypothesis
import hypothesis.strategies as st

T = TypeVar("T")
FUZZ = int(os.environ.get("DDPM_EXT_FUZZ", "0"))


class Choose:
    """Makes choices by hypothesis. If a test fails, hypothesis prints the choices with their names."""

    def __init__(self, data: Any) -> None:
        self.draw = data.draw

    def integer(self, low: int, high: int, name: str = "") -> int:
        """An integer in [low, high]."""
        return self.draw(st.integers(low, high), name)

    def one_of(self, options: Sequence[T], name: str = "") -> T:
        """One of the options."""
        return self.draw(st.sampled_from(options), name)

    def order(self, count: int, name: str = "") -> list[int]:
        """A permutation of 0 to count - 1."""
        return self.draw(st.permutations(range(count)), name)

    def several(self, make: Callable[[], T], least: int, most: int, name: str = "") -> list[T]:
        """The results of `least` to `most` calls of `make`."""
        return [make() for _ in range(self.integer(least, most, name))]


def for_many(examples: int = 150) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a test that takes `choose`, a Choose. The test runs for `examples` different sets of choices."""
    settings = hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    if FUZZ:  # only Phase.generate: reducing a failing input would take minutes
        settings = hypothesis.settings(
            settings, max_examples=min(FUZZ, 20 * examples), derandomize=False, phases=[hypothesis.Phase.generate]
        )
    return lambda test: settings(hypothesis.given(choose=st.builds(Choose, st.data()))(test))
