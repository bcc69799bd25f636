"""Records which operators are called: all of them, or only ddpm_ext's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Records the names of the operators that are called, such as aten::add and ddpm_ext::randn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def note(self, name: str) -> None:
        self.names.append(name)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(function._schema.name)
        return function(*args, **(kwargs or {}))


class _Launches(Operators):
    def note(self, name: str) -> None:
        library, _, name = name.partition("::")
        if library == "ddpm_ext" and name not in ("randn", "draw_seed"):
            self.names.append(name)


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """A context that yields the list of ddpm_ext's operators that are called in it.

    The list leaves out randn and draw_seed, which only draw noise and its seed.
    """
    with _Launches() as called:
        yield called.names
