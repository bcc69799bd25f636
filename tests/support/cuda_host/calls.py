"""A call of an operator, made of the CPU's kernels and of the CUDA kernels on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from support.cuda_host import library
from support.cuda_host.guarded import Placed
from torch import Tensor

from ddpm_ext.ops.extension import C

WIDE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
OPERATORS = ("reverse_step", "forward_process", "predict_start", "posterior_mean", "randn")
# dtypes of x and of the second tensor: the model's output, the noise
PAIRS = [(WIDE, WIDE), (WIDE, HALF), (WIDE, BRAIN), (HALF, HALF), (BRAIN, BRAIN)]
SAMPLES = ("x", "second", "noise")
SPECIAL = [0.0, -0.0, 1e-40, -3e38, 6e4, math.inf, -math.inf, math.nan]

Variant = tuple[str, str, tuple[torch.dtype, torch.dtype]]
# (operator, where its noise is from, dtypes): every variant of the kernels. A seed may be read from memory by a GPU.
VARIANTS: list[Variant] = [
    (op, noise, pair)
    for op in OPERATORS
    for noise in {
        "reverse_step": ("none", "given", "drawn", "drawn by a seed in memory"),
        "forward_process": ("none", "given", "drawn", "drawn by a seed in memory"),
        "randn": ("drawn", "drawn by a seed in memory"),
    }.get(op, ("none",))
    for pair in PAIRS
    if pair[0] == pair[1] or op not in ("forward_process", "randn")
]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = WIDE, special: bool = True) -> Tensor:
    """Normal numbers, and here and there a zero, an infinity, a NaN or what is near the ends of the range."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    if special:
        flat = x.view(-1)[seed % 3 :: 11]
        flat.copy_(torch.tensor(SPECIAL).repeat(len(flat) // len(SPECIAL) + 1)[: len(flat)])
    return x.to(dtype)


def step_table() -> Tensor:
    """(8, 8): rows with and without c2 and noise, draws up to 2^31."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(8, 8, generator=generator)
    table[::3, 4] = 0
    table[::4, 5] = 0
    table.view(torch.int32)[:, 6] = torch.randint(2**31, (8,), generator=generator)
    return table


AFFINE = torch.tensor([[0.75, -1.5], [-2.0, 0.5], [1 / 3, 0.0], [0.0, 1.0]])


def make_call(variant: Variant, *shape: int, special: bool = True, **changes: Any) -> tuple[Call, dict[str, Tensor]]:
    """A call of a variant of the kernels, and what only a GPU reads."""
    op, noise, (x_dtype, dtype) = variant
    x = values(*shape, dtype=x_dtype, special=special)
    call = Call(op, x, step_table() if op == "reverse_step" else AFFINE, seed=-3, first_id=2**32 - 2)
    if op in ("reverse_step", "predict_start", "posterior_mean"):
        call = replace(call, second=values(*shape, seed=1, dtype=dtype, special=special))
    if noise == "given":
        call = replace(call, noise=values(*shape, seed=2, dtype=x_dtype, special=special))
    if op != "randn":
        call = replace(call, t=torch.arange(shape[0]) % len(call.table))
    call = replace(call, drawn=noise.startswith("drawn"), **changes)
    return call, {"seed": torch.tensor(call.seed)} if noise.endswith("memory") else {}


def hide_seed(call: Call, gpu: Mapping[str, Tensor]) -> Call:
    """The seed by value must not be what is used, where a GPU has it in memory."""
    return replace(call, seed=~call.seed) if "seed" in gpu else call


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Which of the NaNs it is, is nobody's promise."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    whole = torch.int32 if got.dtype == WIDE else torch.int16
    number = ~expected.isnan()
    assert torch.equal(got.isnan(), expected.isnan()), what
    assert torch.equal(got.view(whole)[number], expected.view(whole)[number]), what


@dataclass(frozen=True)
class Call:
    """Arguments as ddpm_ext.ops takes them; `second` is a model's output, or predict_start's and posterior_mean's."""

    op: str
    x: Tensor  # randn: of its result's shape and dtype
    table: Tensor
    second: Tensor | None = None
    noise: Tensor | None = None
    drawn: bool = False
    t: Tensor | None = None
    t_index: int = 0
    clip: tuple[float, float] = (-1.0, 1.0)
    seed: int = 0
    ids: Tensor | None = None
    first_id: int = 0
    stream: int = 0
    draw: int = -1

    def arguments(self, out: Tensor | None) -> tuple[Any, ...]:
        """As the compiled modules take them; randn's for torch.ops."""
        rng = (None, self.seed, self.ids, self.first_id, self.stream, self.draw, None)
        row = (self.table, self.t, self.t_index)
        if self.op == "randn":
            return list(self.x.shape), *rng
        if self.op == "reverse_step":
            return self.x, self.second, *row, *self.clip, self.noise, self.drawn, *rng, out
        if self.op == "forward_process":
            return self.x, *row, self.noise, self.drawn, *rng, out
        return self.x, self.second, *row

    def __str__(self) -> str:
        layouts = {n: (t.dtype, tuple(t.shape), t.stride()) for n in SAMPLES if (t := getattr(self, n)) is not None}
        return f"{self.op} of {layouts}"

    def on_cpu(self) -> Tensor:
        if self.op == "randn":
            return torch.ops.ddpm_ext.randn(*self.arguments(None), dtype=self.x.dtype, device="cpu")
        return getattr(C, self.op)(*self.arguments(None))

    def with_tensors(self, change: Any) -> Call:
        """change(name, tensor) in place of each of the samples' tensors."""
        names = [name for name in SAMPLES if getattr(self, name) is not None]
        return replace(self, **{name: change(name, getattr(self, name)) for name in names})


@dataclass
class Host:
    """The CUDA kernels on the CPU."""

    path: Path  # of the library
    operators: Any = field(init=False)
    control: Any = field(init=False)

    def __post_init__(self) -> None:
        self.operators = library.load(self.path, "operators")
        self.control = library.load(self.path, "control")

    def run(
        self,
        call: Call,
        places: Mapping[str, str] | str = "front",
        *,
        out: Tensor | None = None,
        in_place: bool = False,
        gpu: Mapping[str, Tensor] | None = None,
        place_gpu: bool = True,
    ) -> Tensor:
        """The call's result, its tensors put into guarded memory, their strides kept.

        Args:
            places: where each tensor lies, by name, or all.
            out: whose strides the result has; None: x's.
            in_place: the result goes where x is.
            gpu: "t", "sample_ids" or "seed" that only a GPU's kernel reads, unchecked.
            place_gpu: False: these stay where they are.
        """
        placed: dict[str, Placed] = {}

        def place(name: str, tensor: Tensor) -> Tensor:
            where = places if isinstance(places, str) else places.get(name, "front")
            if name == "table":
                where = "back"  # rows are read 128 bits at a time
            placed[name] = Placed(tensor, where, self.control)
            return placed[name].tensor

        if call.op != "randn":
            call = call.with_tensors(place)
            call = replace(call, table=place("table", call.table))
        for name in ("t", "ids"):
            if getattr(call, name) is not None:
                call = replace(call, **{name: place(name, getattr(call, name))})
        instead = dict(gpu or {})
        if place_gpu:
            instead = {name: place(f"gpu {name}", tensor) for name, tensor in instead.items()}
        if in_place:
            result = call.x
        else:
            fresh = torch.empty_like(call.x, memory_format=torch.contiguous_format if call.op == "randn" else None)
            like = fresh if out is None else out
            whole = torch.int32 if like.dtype == WIDE else torch.int16
            nothing = torch.empty_strided(like.shape, like.stride(), dtype=whole).fill_(-63).view(like.dtype)
            result = place("out", nothing)
        takes_out = call.op in ("reverse_step", "forward_process")
        self.control.instead(
            *map(instead.get, ("t", "sample_ids", "seed")), None if takes_out else result, instead.get("draw")
        )
        try:
            if call.op == "randn":
                self.control.randn(*call.arguments(None), call.x.dtype)
            else:
                getattr(self.operators, call.op)(*call.arguments(result))
        finally:
            self.control.instead(None, None, None, None, None)
        written = "x" if in_place else "out"
        return {name: p.done(name == written) for name, p in placed.items()}[written]

    def check(self, call: Call, *args: Any, expected: Tensor | None = None, **options: Any) -> None:
        """That both give the same bits."""
        expected = call.on_cpu() if expected is None else expected
        assert_same_bits(self.run(call, *args, **options), expected, f"{call} {args} {options}")


@functools.cache
def open_host(folder: Path) -> Host:
    """With the library of the session whose folder this is."""
    return Host(library.for_session(folder))
