"""The proof that rows do what somebody's own step does: on his samples, in his loop, beside his code.

In a first loop the step's own code runs, and the loop gets its results. The rows are computed beside it, with the same
noise. Where both agree in every step of that loop, the rows take the steps of the loops after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.tensors import version_of

HOW = "accelerate(..., trace=True) replaces such steps, once it has compared them in a first loop"
ROUNDED = 16  # roundings of the result's dtype by which both may differ, of the largest terms that they add up
LARGE = 2**20  # bytes of an array that are compared


class Proof:
    """What is known of the rows for a kind of loop.

    Attributes:
        holds: the steps in which rows agreed with the step's own code.
        failed: why rows must not be used; None: nothing speaks against them.
        stores: the attributes that the step's own code has written.
    """

    def __init__(self) -> None:
        self.holds: set[int] = set()
        self.stores: set[str] = set()
        self.failed: str | None = None

    def compare(self, step: int, of_rows: Iterable[Tensor | None], of_code: Iterable[Any], size: float) -> None:
        """Notes whether the results of rows agree with those of a step's own code. size: of the largest terms."""
        of_rows, of_code = list(of_rows), list(of_code)
        if len(of_rows) != len(of_code):
            self.failed = f"step {step} returns something else than its rows"
        for ours, theirs in zip(of_rows, of_code, strict=False):
            if ours is None or self.failed is not None:
                continue
            is_like = isinstance(theirs, Tensor) and (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
            if not is_like or theirs.requires_grad != ours.requires_grad:
                self.failed = f"step {step} returns something else than its rows"
                return
            bound = ROUNDED * torch.finfo(ours.dtype).eps * size
            far = (theirs.detach().double() - ours.double()).abs().max().item() if ours.numel() else 0.0
            if not far <= bound:
                self.failed = f"step {step} differs from its rows by {far:.2g}, where {bound:.2g} is rounding"
        self.holds.add(step)


class Generators:
    """The states of the random generators that a step may draw from, to be drawn from twice."""

    def __init__(self, device: torch.device, generator: Any = None) -> None:
        """generator: that of a call, or several, beside torch's own."""
        generators = [torch.default_generator, *(generator if isinstance(generator, list | tuple) else [generator])]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]

    def rewind(self) -> None:
        for generator, state in self._states:
            generator.set_state(state)


def setting_of(x: Any) -> Hashable:
    """A key of a setting: numbers and texts by their value, tensors by how often they were written to, containers by
    what they hold, and other objects by their identity. Who keeps the key must hold x."""
    if isinstance(x, Tensor):
        return id(x), version_of(x)
    if isinstance(x, float):
        return x.hex()  # by which NaN is the same, and -0 another
    if isinstance(x, np.ndarray) and x.nbytes <= LARGE:
        return x.shape, x.tobytes()
    if isinstance(x, dict):
        return "dict", *[(setting_of(key), setting_of(value)) for key, value in x.items()]
    if isinstance(x, list | tuple | SimpleNamespace):
        return type(x), *map(setting_of, vars(x).items() if isinstance(x, SimpleNamespace) else x)
    return (type(x), x) if isinstance(x, int | str | torch.dtype | torch.device) else id(x)


def kinds_of(arguments: Mapping[str, Any] | None) -> Hashable:
    """A key of what a loop passes on to its model: as setting_of, but tensors, which each loop makes anew, by their
    shape and dtype."""
    return tuple([
        (name, x.shape, x.dtype) if isinstance(x, Tensor) else (name, setting_of(x))
        for name, x in (arguments or {}).items()
    ])  # fmt: skip


def contents(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an object with their keys, to be compared with by `changed`."""
    return {name: (x, setting_of(x)) for name, x in state.items()}


def changed(before: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """The names of the attributes that a step has written to, or deleted, since `contents` was called."""
    names = [n for n, x in state.items() if n not in before or before[n][0] is not x or before[n][1] != setting_of(x)]
    return [*names, *(before.keys() - state.keys())]


def why_left_alone(method: str, names: Iterable[str]) -> str:
    """Of an object whose step changes these attributes, on which its rows depend, again and again."""
    return f"its {method} changes {', '.join(sorted(names))} in every loop, and runs as it is from now on"
