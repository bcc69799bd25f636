"""Which of our operators are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = function._schema.name.partition("::")
        if library == "ddpm_ext" and name not in ("randn", "draw_seed"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the operators that are called, but for those that only draw."""
    with _Launches() as called:
        yield called.names
