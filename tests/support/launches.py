"""Which operators are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Notes the names of all operators, such as "aten::add"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(*function._schema.name.split("::"))
        return function(*args, **(kwargs or {}))

    def note(self, library: str, name: str) -> None:
        self.names.append(f"{library}::{name}")


class _Launches(Operators):
    def note(self, library: str, name: str) -> None:
        if library == "ddpm_ext" and name not in ("randn", "draw_seed"):
            self.names.append(name)


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The names of our operators that are called, but for those that only draw."""
    with _Launches() as called:
        yield called.names
