"""A call of the extended or the linear step, made of the CPU's kernels and of the CUDA kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from support import extended, linear
from support.cuda_host.calls import WIDE, Host, assert_same_bits, values
from support.cuda_host.guarded import Placed
from torch import Tensor

from ddpm_ext.ops.extension import C

TABLES = {step.OPERATOR: step.make_table(8) for step in (extended, linear)}
SCALES = extended.PER_SAMPLE
assert linear.PER_SAMPLE == SCALES


def read(step: ModuleType) -> tuple[str, ...]:
    return ("x_t", "model_output", "noise", *step.LIKE_X, *step.OF_MODEL)


def options_of(step: ModuleType) -> tuple[str, ...]:
    return (*step.LIKE_X, *step.OF_MODEL, *step.PER_SAMPLE)


@dataclass(frozen=True)
class StepCall:
    """Arguments as ddpm_ext.ops takes them: `tensors` and `results` by their names there. `step` is support.extended or
    support.linear."""

    step: ModuleType
    tensors: Mapping[str, Tensor]
    results: tuple[str, ...] = ()  # all of the step's, unless some are given
    log_variance: bool = True
    table: Tensor | None = None  # the step's of TABLES, unless one is given
    t: Tensor | None = None
    t_index: int = 0
    clip: tuple[float, float] = (-1.0, 1.0)
    drawn: bool = False
    seed: int = 0
    ids: Tensor | None = None
    first_id: int = 0
    stream: int = 0
    draw: int = -1

    def __post_init__(self) -> None:
        if not self.results:
            object.__setattr__(self, "results", self.step.RESULTS)
        if self.table is None:
            object.__setattr__(self, "table", TABLES[self.step.OPERATOR])

    def arguments(self, results: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """As the compiled modules take them."""
        given = {**self.tensors, **results, "log_variance": self.log_variance}
        row, rng = (
            (self.table, self.t, self.t_index),
            (None, self.seed, self.ids, self.first_id, self.stream, self.draw, None),
        )
        how = (*row, *self.clip, given.get("noise"), self.drawn, *rng, given["out"])
        return given["x_t"], given.get("model_output"), *how, *map(given.get, self.step.INPUTS)

    def __str__(self) -> str:
        layouts = {name: (t.dtype, tuple(t.shape), t.stride()) for name, t in self.tensors.items()}
        return (
            f"{self.step.OPERATOR} of {layouts}, drawn {self.drawn}, log_variance {self.log_variance}, {self.results}"
        )

    def on_cpu(self) -> dict[str, Tensor]:
        results = {name: torch.empty_like(self.tensors["x_t"]) for name in self.results}
        getattr(C, self.step.OPERATOR)(*self.arguments(results))
        return results

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> StepCall:
        """change(name, tensor) in place of each that is like x."""
        changed = {n: t if n in SCALES else change(n, t) for n, t in self.tensors.items()}
        return replace(self, tensors=changed)


def make_call(
    step: ModuleType,
    shape: tuple[int, ...],
    pair: tuple[torch.dtype, torch.dtype] = (WIDE, WIDE),
    options: Iterable[str] | None = None,
    noise: str = "drawn",
    special: bool = True,
    **changes: Any,
) -> StepCall:
    """With those options, or all; noise: none, given or drawn. Without model_output among the changes' `without`."""
    without = changes.pop("without", ())
    options = options_of(step) if options is None else options
    names = ["x_t", "model_output", *(["noise"] if noise == "given" else []), *options]
    tensors = {}
    for i, name in enumerate(n for n in names if n not in without):
        dtype = pair[1] if name in ("model_output", *step.OF_MODEL) else pair[0]
        tensors[name] = values(*shape, seed=i, dtype=dtype, special=special)
        if name in SCALES:
            tensors[name] = values(shape[0], seed=40 + i, special=False)
        if name == "mask":
            tensors[name] = values(*shape, seed=60, special=False).sigmoid().to(dtype)
    how = {"t": torch.arange(shape[0]) % 8, "seed": -3, "first_id": 2**32 - 2, **changes}
    return StepCall(step, tensors, drawn=noise == "drawn", **how)


def run(
    host: Host,
    call: StepCall,
    places: Mapping[str, str] | str = "front",
    *,
    like: Tensor | None = None,
    instead: Mapping[str, str] | None = None,
    gpu: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The results by name, all tensors put into guarded memory, their strides kept.

    Args:
        places: where each tensor lies, by name, or all.
        like: whose strides the results have; None: x's.
        instead: results that go where an argument is.
        gpu: "t", "sample_ids" or "seed" that only a GPU's kernel reads, unchecked.
    """
    placed: dict[str, Placed] = {}

    def place(name: str, tensor: Tensor) -> Tensor:
        where = places if isinstance(places, str) else places.get(name, "front")
        placed[name] = Placed(tensor, "back" if name == "table" else where, host.control)
        return placed[name].tensor

    x = call.tensors["x_t"]
    if like is None:
        like = torch.empty_like(x)
    call = replace(
        call,
        tensors={name: place(name, tensor) for name, tensor in call.tensors.items()},
        table=place("table", call.table),
        t=None if call.t is None else place("t", call.t),
        ids=None if call.ids is None else place("ids", call.ids),
    )
    instead = dict(instead or {})
    whole = torch.int32 if x.dtype == WIDE else torch.int16
    for name in set(call.results) - set(instead):
        place(name, torch.empty_strided(like.shape, like.stride(), dtype=whole).fill_(-63).view(x.dtype))
    where = {name: instead.get(name, name) for name in call.results}
    pointers = {name: place(f"gpu {name}", tensor) for name, tensor in (gpu or {}).items()}
    host.control.instead(*map(pointers.get, ("t", "sample_ids", "seed")), None, pointers.get("draw"))
    try:
        getattr(host.operators, call.step.OPERATOR)(
            *call.arguments({name: placed[at].tensor for name, at in where.items()})
        )
    finally:
        host.control.instead(None, None, None, None, None)
    found = {name: p.done(name in where.values()) for name, p in placed.items()}
    return {name: found[at] for name, at in where.items()}


def check(host: Host, call: StepCall, *args: Any, expected: Mapping[str, Tensor] | None = None, **options: Any) -> None:
    """That both give the same bits."""
    expected = call.on_cpu() if expected is None else expected
    got = run(host, call, *args, **options)
    assert got.keys() == expected.keys()
    for name, result in got.items():
        assert_same_bits(result, expected[name], f"{name} of {call} {args} {options}")
