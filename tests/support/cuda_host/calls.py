"""Calls of operators, and the checks that the CUDA kernels, run on the CPU, give the bits of the CPU kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from support.cuda_host import library
from support.cuda_host.guarded import Placed, extent
from support.rounding import same_bits
from support.step_inputs import LIKE_X, OF_MODEL, PER_SAMPLE, RESULTS, make_table
from torch import Tensor

from ddpm_ext.ops.extension import C
from ddpm_ext.ops.step_inputs import STEP_INPUTS

WIDE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
Pair = tuple[torch.dtype, torch.dtype]
# The dtypes of x_t and of the operator's second tensor, such as the model's output.
PAIRS: list[Pair] = [(WIDE, WIDE), (WIDE, HALF), (WIDE, BRAIN), (HALF, HALF), (BRAIN, BRAIN)]
SPECIAL = [0.0, -0.0, 1e-40, -3e38, 6e4, math.inf, -math.inf, math.nan]
STEP = "step_with_options"
OPTIONS = (*LIKE_X, *OF_MODEL, *PER_SAMPLE)

# The kinds of noise with which each operator is called. With SEED_IN_MEMORY, the kernel reads the seed from memory.
SEED_IN_MEMORY = "drawn by a seed in memory"
NOISES = {
    "reverse_step": ("none", "given", "drawn", SEED_IN_MEMORY),
    "forward_process": ("none", "given", "drawn", SEED_IN_MEMORY),
    "predict_start": ("none",),
    "posterior_mean": ("none",),
    "randn": ("drawn", SEED_IN_MEMORY),
    STEP: ("none", "given", "drawn"),
}
STREAMS = ("null", "of torch", "external")  # in the order of standin::Streams (c10/cuda/CUDAStream.h)
TAKE_OUT = ("reverse_step", "forward_process", STEP)  # the operators that can write to a tensor of the caller

Variant = tuple[str, str, Pair]
# Every variant of the kernels: the operator, the kind of noise, and the dtypes.
VARIANTS: list[Variant] = [
    (op, noise, pair)
    for op, noises in NOISES.items()
    for noise in noises
    for pair in PAIRS
    if pair[0] == pair[1] or op not in ("forward_process", "randn")
]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = WIDE, special: bool = True) -> Tensor:
    """Normal numbers. If `special`, some of them are replaced by SPECIAL: zeros, infinities, NaN and others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    if special:
        flat = x.view(-1)[seed % 3 :: 11]
        flat.copy_(torch.tensor(SPECIAL).repeat(len(flat) // len(SPECIAL) + 1)[: len(flat)])
    return x.to(dtype)


ROWS = make_table(8)  # a step table: rows with and without the terms of the output, noise, guidance and history
AFFINE = torch.tensor([[0.75, -1.5], [-2.0, 0.5], [1 / 3, 0.0], [0.0, 1.0]])


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    assert same_bits(got, expected), what


@dataclass(frozen=True)
class Call:
    """The arguments of a call of an operator.

    Tensors and results have the names that they have in step_with_options. For the other operators, the first tensor is
    `x_t`, and the second tensor of predict_start and posterior_mean is `model_output`. randn's result has the shape and
    dtype of `x_t`.
    """

    op: str
    tensors: Mapping[str, Tensor]
    table: Tensor
    results: tuple[str, ...] = ("out",)
    log_variance: bool = True
    drawn: bool = False
    t: Tensor | None = None
    t_index: int = 0
    clip: tuple[float, float] = (-1.0, 1.0)
    seed: int = 0
    seed_in_memory: bool = False  # whether the GPU reads the seed from memory
    ids: Tensor | None = None
    first_id: int = 0
    stream: int = 0
    draw: int = -1
    input_kind: tuple[torch.dtype | None, int] = (None, 1)  # model_input's dtype (None: x_t's), its batch / x_t's batch

    @property
    def x(self) -> Tensor:
        return self.tensors["x_t"]

    @property
    def read(self) -> tuple[str, ...]:
        """The names of the tensors like x_t that the kernel reads."""
        return () if self.op == "randn" else tuple(name for name in self.tensors if name not in PER_SAMPLE)

    @property
    def moved(self) -> tuple[int, int]:
        """The bytes that the kernel reads from tensors like x_t, and the bytes of its results, if all are like x_t."""
        return sum(self.tensors[name].nbytes for name in self.read), len(self.results) * self.x.nbytes

    def arguments(self, results: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The arguments by position, as functions of the compiled modules take them; for randn, as torch.ops does."""
        by_name = {**self.tensors, **results, "log_variance": self.log_variance}
        x, second, noise = map(by_name.get, ("x_t", "model_output", "noise"))
        written = [by_name["out"]] if "out" in by_name else []
        rng = (None, self.seed, self.ids, self.first_id, self.stream, self.draw, None)
        row = (self.table, self.t, self.t_index)
        if self.op == "randn":
            return list(x.shape), *rng
        if self.op == "forward_process":
            return x, *row, noise, self.drawn, *rng, *written
        if self.op not in TAKE_OUT:
            return x, second, *row
        options = map(by_name.get, STEP_INPUTS) if self.op == STEP else ()
        return x, second, *row, *self.clip, noise, self.drawn, *rng, *written, *options, None

    def run_by(self, module: Any, results: Mapping[str, Tensor]) -> Any:
        """Calls the operator in a compiled module, ddpm_ext._C or `operators`, and returns its result."""
        name = f"{self.op}_out" if self.op != STEP and self.op in TAKE_OUT and "out" in results else self.op
        return getattr(module, name)(*self.arguments(results))

    def __str__(self) -> str:
        layouts = {name: (t.dtype, tuple(t.shape), t.stride()) for name, t in self.tensors.items()}
        return f"{self.op} of {layouts}, drawn {self.drawn}, log_variance {self.log_variance}, {self.results}"

    def on_cpu(self) -> dict[str, Tensor]:
        """The results of the CPU kernels, by name."""
        if self.op == "randn":
            return {"out": torch.ops.ddpm_ext.randn(*self.arguments({}), dtype=self.x.dtype, device="cpu")}
        results = {name: self.result_like(name, self.x) for name in self.results} if self.op == STEP else {}
        result = self.run_by(C, results)
        return results or {"out": result}

    def result_like(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised tensor for the result `name`, with the strides of `like`."""
        dtype, times = self.input_kind if name == "model_input" else (None, 1)
        like = like if times == 1 else torch.cat([like] * times)
        return torch.empty_strided(like.shape, like.stride(), dtype=dtype or like.dtype)

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """A copy of the call in which change(name, tensor) replaces each tensor that is like x_t."""
        return replace(self, tensors={n: t if n in PER_SAMPLE else change(n, t) for n, t in self.tensors.items()})


def make_call(
    variant: Variant,
    *shape: int,
    options: Iterable[str] = OPTIONS,
    without: tuple[str, ...] = (),
    special: bool = True,
    **changes: Any,
) -> Call:
    """A call of a variant, on samples of `shape` (batch, ...).

    step_with_options gets the tensors `options`, too, and writes all of its results. The call does not have the tensors
    with names in `without`. `changes` replaces fields of the Call.
    """
    op, noise, pair = variant
    names = ["x_t", *["model_output"] * (op not in ("forward_process", "randn")), *["noise"] * (noise == "given")]
    tensors = {}
    for i, name in enumerate(n for n in (*names, *(options if op == STEP else ())) if n not in without):
        dtype = pair[name in ("model_output", *OF_MODEL)]
        tensors[name] = values(*shape, seed=i, dtype=dtype, special=special)
        if name in PER_SAMPLE:
            tensors[name] = values(shape[0], seed=40 + i, special=False)
        elif name == "mask":
            tensors[name] = values(*shape, seed=60, special=False).sigmoid().to(dtype)
    table = ROWS if op in ("reverse_step", STEP) else AFFINE
    fields = {"drawn": noise.startswith("drawn"), "seed_in_memory": noise == SEED_IN_MEMORY, "seed": -3}
    fields |= {"first_id": 2**32 - 2, "t": None if op == "randn" else torch.arange(shape[0]) % len(table)}
    fields |= {"results": RESULTS} if op == STEP else {}
    return Call(op, tensors, **{"table": table, **fields, **changes})


def unwritten(like: Tensor) -> Tensor:
    """A tensor like `like`, with bits that no kernel writes."""
    bits = torch.int32 if like.dtype == WIDE else torch.int16
    return torch.empty_strided(like.shape, like.stride(), dtype=bits).fill_(-63).view(like.dtype)


@dataclass
class Host:
    """The compiled library that runs the CUDA kernels on the CPU."""

    path: Path  # of the library
    operators: Any = field(init=False)
    control: Any = field(init=False)

    def __post_init__(self) -> None:
        self.operators = library.load(self.path, "operators")
        self.control = library.load(self.path, "control")

    def launch(self, call: Call, results: Mapping[str, Tensor], gpu: Mapping[str, Tensor] | None = None) -> None:
        """Runs the kernels of a call, which write to `results`.

        gpu: tensors "t", "sample_ids", "seed" or "draw" as if they were in GPU memory: the operator does not check
            their values, and the kernel reads them.
        """
        gpu = dict(gpu or {})
        if call.seed_in_memory:
            # A kernel that takes the seed of the call instead of the seed in memory gives other noise.
            gpu["seed"], call = torch.tensor(call.seed), replace(call, seed=~call.seed)
        out = None if call.op in TAKE_OUT else results["out"]
        self.control.instead(*map(gpu.get, ("t", "sample_ids", "seed")), out, gpu.get("draw"))
        try:
            if call.op == "randn":
                self.control.randn(*call.arguments({}), call.x.dtype)
            else:
                call.run_by(self.operators, results)
        finally:
            self.control.instead(None, None, None, None, None)

    def run(
        self,
        call: Call,
        places: Mapping[str, str] | str = "front",
        *,
        like: Tensor | None = None,
        instead: Mapping[str, str] | None = None,
        gpu: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the kernels with copies of all tensors in guarded memory, and returns the results by name.

        The copies have the strides of the tensors. A tensor that would take more than 2^26 elements is not copied.

        Args:
            places: where each tensor is in its guarded memory (Placed), by the tensor's name, or one place for all.
            like: a tensor whose strides the results get. With None, torch.empty_like(x_t), contiguous for randn.
            instead: the name of the argument that a result overwrites, by the result's name.
            gpu: as in launch.
        """
        placed: dict[str, Placed] = {}

        def place(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None or extent(tensor) > 2**26:
                return tensor
            where = places if isinstance(places, str) else places.get(name, "front")
            # A table ends at the end of a page. A kernel that reads beyond the last row touches the guard page.
            placed[name] = Placed(tensor, "back" if name == "table" else where, self.control)
            return placed[name].tensor

        if like is None:
            like = torch.empty_like(call.x, memory_format=torch.contiguous_format if call.op == "randn" else None)
        if call.op != "randn":
            call = replace(call, tensors={name: place(name, tensor) for name, tensor in call.tensors.items()})
            call = replace(call, table=place("table", call.table))
        call = replace(call, t=place("t", call.t), ids=place("ids", call.ids))
        written_to = {name: (instead or {}).get(name, name) for name in call.results}
        new_results = {
            name: place(name, unwritten(call.result_like(name, like)))
            for name, target in written_to.items()
            if target == name
        }
        results = {
            name: new_results[name] if target == name else call.tensors[target] for name, target in written_to.items()
        }
        self.launch(call, results, {name: place(f"gpu {name}", tensor) for name, tensor in (gpu or {}).items()})
        after = {name: p.done(name in written_to.values()) for name, p in placed.items()}
        return {name: after[target] for name, target in written_to.items()}

    @contextmanager
    def on_other_device(self, device: int, streams: str) -> Iterator[None]:
        """A context in which tensors are on `device`, while the other device is the current device.

        Checks that each launch, each memset and each allocation by torch's allocator is on the current stream of
        `device`, and that `device` is the current device during it. Checks that the other device is the current device
        at the end.

        streams: the kind of the current streams, one of STREAMS.
        """
        control = self.control
        control.set_device(device)
        control.set_current_device(1 - device)
        control.set_streams(STREAMS.index(streams))
        control.take_works()
        try:
            yield
            assert control.current_device() == 1 - device
            assert set(control.take_works()) == {(control.current_stream(device), device)}
        finally:
            control.set_device(0)
            control.set_current_device(0)
            control.set_streams(0)

    def check(self, call: Call, *args: Any, expected: Mapping[str, Tensor] | None = None, **options: Any) -> None:
        """Checks that the CUDA kernels give the bits of the CPU kernels, or those of `expected`."""
        expected = call.on_cpu() if expected is None else expected
        got = self.run(call, *args, **options)
        assert got.keys() == expected.keys()
        for name, result in got.items():
            assert_same_bits(result, expected[name], f"{name} of {call} {args} {options}")


def variant_name(variant: tuple[Any, ...]) -> str:
    return "-".join([variant[0], variant[1], *(str(dtype).removeprefix("torch.") for dtype in variant[2])])


def moves_by_words(host: Host, call: Call) -> None:
    """Checks that a call that cannot use Access::vector still moves its samples by words of several elements.

    Then the sectors (32 bytes) of the warps' accesses have only slightly more bytes than the samples, since the words
    of a warp may begin within a sector. The call runs on device 1, which is so small that threads take several turns.
    """
    host.control.set_device(1)
    expected = call.on_cpu()
    loaded_and_stored = host.control.sectors_of(lambda: host.check(call, expected=expected))
    for sectors, size in zip(loaded_and_stored, call.moved, strict=True):
        assert 0.99 * size <= 32 * sectors <= 1.14 * size, (call, sectors, size)
    assert not host.control.took_vectors()


@functools.cache
def open_host(folder: Path) -> Host:
    """The Host of a test session, with the library that library.for_session(folder) returns."""
    return Host(library.for_session(folder))
