"""Proves that rows of a table have the same results as a step that a user wrote, on the samples of the user's loop.

In the first loop, the user's code runs and determines the samples. The rows are also computed, with the same noise. If
both agree in every step of this loop, the rows replace the user's code in later loops.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.tensors import version_of

TRACE_HINT = "accelerate(..., trace=True) replaces such steps, once it has compared them in a first loop"
MAX_ROUNDINGS = 16  # a row and a step may differ by this many roundings of their largest term, in the result's dtype
LARGEST_COMPARED = 2**20  # bytes; larger arrays are compared by identity alone


class Proof:
    """The comparison of the rows with a step's code, for loops of one shape, dtype, device and setting.

    Attributes:
        holds: the indices of the steps that were compared. The rows agreed with the code in all of them if `failed` is
            None.
        failed: why the rows must not be used, or None if no step has differed.
        stores: the names of the attributes that the code has written.
    """

    def __init__(self) -> None:
        self.holds: set[int] = set()
        self.stores: set[str] = set()
        self.failed: str | None = None

    def compare(
        self, step: int, row_results: Iterable[Tensor | None], code_results: Iterable[Any], size: float
    ) -> None:
        """Records whether the results of the rows agree with those of the step's code.

        Args:
            step: the index of the step.
            row_results, code_results: what the step returns, in the same order. A row's result of None is not compared.
            size: the size of the largest term in the sums that both compute.
        """
        row_results, code_results = list(row_results), list(code_results)
        if len(row_results) != len(code_results):
            self.failed = f"step {step} returns something else than its rows"
        for row_result, code_result in zip(row_results, code_results, strict=False):
            if row_result is None or self.failed is not None:
                continue
            has_shape_and_dtype = isinstance(code_result, Tensor) and (code_result.shape, code_result.dtype) == (
                row_result.shape,
                row_result.dtype,
            )
            if not has_shape_and_dtype or code_result.requires_grad != row_result.requires_grad:
                self.failed = f"step {step} returns something else than its rows"
                return
            bound = MAX_ROUNDINGS * torch.finfo(row_result.dtype).eps * size
            error = (
                (code_result.detach().double() - row_result.double()).abs().max().item() if row_result.numel() else 0.0
            )
            if not error <= bound:
                self.failed = f"step {step} differs from its rows by {error:.2g}, where {bound:.2g} is rounding"
        self.holds.add(step)


class Generators:
    """The states of the random generators that a step may draw from. `rewind` restores them for a second draw."""

    def __init__(self, device: torch.device, generator: Any = None) -> None:
        """generator: the argument of a step: a generator, a list of generators or None. torch's default generators of
        the CPU and of `device` are added.
        """
        generators = [torch.default_generator, *(generator if isinstance(generator, list | tuple) else [generator])]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = [
            (generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)
        ]

    def rewind(self) -> None:
        """Restores the states that the generators had when this object was made."""
        for generator, state in self._states:
            generator.set_state(state)


def setting_key(x: Any) -> Hashable:
    """A cache key of a setting.

    Numbers, strings, dtypes, devices and small NumPy arrays count by value, tensors by identity and version, lists,
    tuples, dicts and namespaces by their elements, and other objects by identity. A cache with such a key must keep x
    alive, because Python may reuse the id of a dead object.
    """
    if isinstance(x, Tensor):
        return id(x), version_of(x)
    if isinstance(x, float):
        return x.hex()  # so that NaN equals NaN, and -0 differs from 0
    if isinstance(x, np.ndarray) and x.nbytes <= LARGEST_COMPARED:
        return x.shape, x.tobytes()
    if isinstance(x, dict):
        return "dict", *[(setting_key(key), setting_key(value)) for key, value in x.items()]
    if isinstance(x, list | tuple | SimpleNamespace):
        return type(x), *map(setting_key, vars(x).items() if isinstance(x, SimpleNamespace) else x)
    return (type(x), x) if isinstance(x, int | str | torch.dtype | torch.device) else id(x)


def kinds_of(arguments: Mapping[str, Any] | None) -> Hashable:
    """A cache key of the arguments that a loop passes on to its model.

    The keys are those of setting_key, except that tensors count by shape and dtype: each loop has new tensors.
    """
    return tuple([
        (name, x.shape, x.dtype) if isinstance(x, Tensor) else (name, setting_key(x))
        for name, x in (arguments or {}).items()
    ])  # fmt: skip


def contents(state: Mapping[str, Any]) -> dict[str, Any]:
    """{name: (value, key)} of an object's attributes, for a later call of `changed`."""
    return {name: (x, setting_key(x)) for name, x in state.items()}


def changed(before: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """The names of the attributes that were written or deleted since `contents` returned `before`."""
    names = [n for n, x in state.items() if n not in before or before[n][0] is not x or before[n][1] != setting_key(x)]
    return [*names, *(before.keys() - state.keys())]


def why_left_alone(method: str, names: Iterable[str]) -> str:
    """The reason for a fallback: the rows depend on these attributes, and the step changes them in each loop."""
    return f"its {method} changes {', '.join(sorted(names))} in every loop, and runs as it is from now on"
