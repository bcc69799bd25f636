"""Calls of the CPU operators for main.cpp, which runs them without torch, with the results that ddpm_ext gives."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from support.step_inputs import RESULTS, make_row, make_table, options
from torch import Tensor

import ddpm_ext
from ddpm_ext import Philox, ops
from ddpm_ext.ops.extension import C

# A dtype's number in the files is its index: first those of DType in csrc/call.h, then two that have no DType.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.float64)
LOSSES = ("mse", "l1", "huber")
SHAPES = ((5, 1), (5, 67), (5, 3, 17, 19), (5, 1024))


class Call(NamedTuple):
    """A call of an operator of main.cpp: its arguments and its expected results, by their names in main.cpp.

    what: the call in words, for messages of tests.
    """

    what: str
    operator: str
    arguments: Mapping[str, Tensor]
    results: Mapping[str, Tensor]


def data(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, calls: Iterable[Call]) -> None:
    """Writes the file that main.cpp reads.

    The file has the number of calls. A call is the operator's name, the number of arrays, and for each array its name,
    dtype, number of bytes and bytes. The arrays are the arguments, and zeros for the results.
    """
    calls = list(calls)
    with path.open("wb") as file:
        file.write(struct.pack("<q", len(calls)))
        for call in calls:
            arrays = {**call.arguments, **{name: torch.zeros_like(result) for name, result in call.results.items()}}
            file.write(struct.pack("<24sq", call.operator.encode(), len(arrays)))
            for name, array in arrays.items():
                content = data(array)
                file.write(struct.pack("<24sqq", name.encode(), DTYPES.index(array.dtype), len(content)) + content)


def read(path: Path) -> Iterator[dict[str, Tensor]]:
    """The arrays of each call in the file that main.cpp has written, by name. They have one dimension.

    The file has the format that `write` describes, without the number of calls and the operators' names.
    """
    content, at = path.read_bytes(), 0
    while at < len(content):
        (count,), at, arrays = struct.unpack_from("<q", content, at), at + 8, {}
        for _ in range(count):
            name, dtype, size = struct.unpack_from("<24sqq", content, at)
            begin, at = at + 40, at + 40 + size
            arrays[name.rstrip(b"\0").decode()] = torch.frombuffer(bytearray(content[begin:at]), dtype=DTYPES[dtype])
        yield arrays


def integer(value: int) -> Tensor:
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(table: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {"table": table, "rows": integer(len(table)), "t": t}


def drawn(seed: int, first_id: int, stream: int = 0) -> dict[str, Tensor]:
    return {"seed": integer(seed), "first_id": integer(first_id), "stream": integer(stream)}


def all_calls() -> Iterator[Call]:
    """Every operator with every dtype and kind of noise; then channels_last samples; then special numbers."""
    pairs = [(a, b) for a, b in itertools.product(DTYPES[:3], DTYPES[:3]) if a in (b, torch.float32)]
    values = {str(shape): [2 * normal(*shape, seed=seed) for seed in (2, 3, 4)] for shape in SHAPES}
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e38]).repeat(20)
    values["odd"] = [each.view(5, 28) for each in (odd, odd.flip(0), odd.roll(3))]
    for (name, tensors), (a, b) in itertools.product(values.items(), pairs):
        x, m, z = (each.to(dtype) for each, dtype in zip(tensors, (a, b, a), strict=True))
        sizes = {"batch": integer(len(x)), "numel": integer(x[0].numel())}
        calls = (make(x, m, z) for make in (simple_calls, option_calls, loss_calls, scale_calls))
        for call in itertools.chain.from_iterable(calls):
            yield call._replace(what=f"{call.what} {name} {a} {b}", arguments={**sizes, **call.arguments})
    # channels_last samples. Whether the noise is reordered in registers, stored at its final position or copied depends
    # on the number of channels and on the instruction set (kernels/noise_by_pixels.h).
    for channels in (2, 3, 4, 5, 8, 12, 16, 24, 32):
        some = (normal(5, channels, 6, 18, seed=seed).to(memory_format=torch.channels_last) for seed in (2, 3, 4))
        sizes = {"batch": integer(5), "numel": integer(channels * 108), "channels_last": integer(channels)}
        for call in itertools.islice(simple_calls(*some), 3):  # the calls that draw noise
            inputs, results = ({n: v.movedim(1, -1) if v.dim() == 4 else v for n, v in d.items()} for d in call[2:])
            yield call._replace(what=f"{call.what} {channels}", arguments={**sizes, **inputs}, results=results)
    for call in special_calls():
        sizes = {"batch": integer(1), "numel": integer(next(iter(call.arguments.values())).numel())}
        yield call._replace(arguments={**sizes, **call.arguments})


def simple_calls(x: Tensor, m: Tensor, z: Tensor) -> Iterator[Call]:
    table, t = make_table(4), torch.tensor([3, 0, 1, 2, 1])
    affine, seed, first = normal(4, 2, seed=1), 2**64 - 3, 2**32 - 2
    rng = {"rng": Philox(seed, first)}
    for noise, noise_arrays, noise_options in (
        ("drawn", drawn(seed, first), rng),
        ("given", {"noise": z}, {"noise": z}),
        ("none", {}, {"add_noise": False}),
    ):
        expected = ops.reverse_step(x, m, table, t, **noise_options)
        arguments = {"x": x, "model_output": m, **rows_of(table, t), **noise_arrays}
        yield Call(f"reverse_step {noise}", "reverse_step", arguments, {"out": expected})
        if x.dtype != m.dtype:
            continue
        expected = ops.forward_process(x, affine, t, **noise_options)
        if noise_arrays.get("stream") is not None:
            noise_arrays = drawn(seed, first, stream=2)
        yield Call(f"affine {noise}", "affine", {"x": x, **rows_of(affine, t), **noise_arrays}, {"out": expected})
        if noise == "drawn" and x.dtype == torch.float32:
            made = C.forward_process_and_noise(x, affine, t, 0, None, True, *rng["rng"].arguments(2))
            both = dict(zip(("out", "noise"), made, strict=True))
            yield Call("affine and its noise", "affine", {"x": x, **rows_of(affine, t), **noise_arrays}, both)
    if x.dtype == m.dtype:
        expected = ddpm_ext.randn(x.shape, Philox(7, 2**56 - 5, draw=2**32 - 1, stream=255), dtype=x.dtype)
        arguments = {**drawn(7, 2**56 - 5, stream=255), "draw": integer(2**32 - 1)}
        yield Call("randn", "randn", arguments, {"out": expected})


def option_calls(x: Tensor, m: Tensor, z: Tensor) -> Iterator[Call]:
    """Calls of the step with options: with none, with all, with each one alone, and with some sets of them.

    `known` and `mask` always come together.
    """
    table, t = make_table(8), torch.tensor([3, 0, 1, 2, 7])
    every = options(tuple(x.shape), x.dtype, m.dtype)
    some = [[name for i, name in enumerate(every) if 0x9E3779B1 * k >> 7 + i & 1] for k in range(1, 9)]
    for i, names in enumerate([[], list(every), *([name] for name in every), *some]):
        given = {name: every[name] for name in names}
        if ("known" in given) != ("mask" in given):
            given |= {name: every[name] for name in ("known", "mask")}
        step_options, noise_arrays = [
            ({"rng": Philox(5, 2**33)}, drawn(5, 2**33)),
            ({"noise": z}, {"noise": z}),
            ({"add_noise": False}, {}),
        ][i % 3]
        results = {name: torch.empty_like(x) for name in RESULTS if name != "out"}
        arguments = {"x_t": x, "model_output": m, **rows_of(table, t), **given, **noise_arrays}
        if "model_variance" in given:
            step_options = {**step_options, "log_variance": i % 2 == 0}
            arguments["variance"] = integer(1 if i % 2 == 0 else 2)
        results["out"] = ops.step_with_options(x, m, table, t, **step_options, **given, **results)
        yield Call(f"step_with_options {i} {names}", "step_with_options", arguments, results)


def special_calls() -> Iterator[Call]:
    """Calls with every float16 and bfloat16 number except NaN, and with float32 numbers of all sizes as a variance."""
    one, row = torch.tensor([0]), make_row(a=1.0, c0=1.0)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).view(1, -1)
        every = torch.where(every.isnan(), torch.zeros_like(every), every)
        expected = ops.reverse_step(every, every, row, 0, add_noise=False)
        arguments = {"x": every, "model_output": every, **rows_of(row, one)}
        yield Call(f"clipped {dtype}", "reverse_step", arguments, {"out": expected})
        for factor in (1 / 3, 1.0, 3.0):
            affine = torch.tensor([[factor, 0.0]])
            expected = ops.forward_process(every, affine, 0, add_noise=False)
            yield Call(f"times {factor} {dtype}", "affine", {"x": every, **rows_of(affine, one)}, {"out": expected})
    v = torch.arange(-(2**31), 2**31, 30011).to(torch.int32).view(torch.float32).view(1, -1)
    row, x, z = make_row(s=1.0, l1=1.0), torch.zeros_like(v), torch.ones_like(v)
    for log in (True, False):
        expected = ops.step_with_options(x, None, row, 0, model_variance=v, noise=z, log_variance=log)
        arguments = {"x_t": x, "model_variance": v, "noise": z, "variance": integer(1 if log else 2)}
        arguments |= rows_of(row, one)
        yield Call(f"deviation {log}", "step_with_options", arguments, {"out": expected})


def loss_calls(x: Tensor, m: Tensor, z: Tensor) -> Iterator[Call]:
    t, loss_table, vlb_table = torch.tensor([3, 0, 1, 2, 1]), normal(4, 4, seed=5), normal(4, 8, seed=6)
    # The column `decoder` of the table: row 1 has the decoder's term, and the other rows a KL divergence.
    vlb_table[:, 7] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    v = normal(*x.shape, seed=8).to(m.dtype)
    for variational, kind, noise in itertools.product((False, True), LOSSES, ("drawn", "given")):
        noise_arrays = drawn(4, 0, stream=2) if noise == "drawn" else {"noise": z}
        noise_options = {"rng": Philox(4)} if noise == "drawn" else {"noise": z}
        leaf = (torch.cat([m, v], 1) if variational else m.clone()).requires_grad_()
        table = vlb_table if variational else loss_table
        options = {"loss": kind, "delta": 0.7, "reduction": "none", "variational": variational, **noise_options}
        expected = ops.diffusion_loss(leaf, x, table, t, **options)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        chunks = torch.zeros(len(x), -(-x[0].numel() // 512), dtype=torch.float64)
        arguments = {"x": x, "model_output": m, **rows_of(table, t), **noise_arrays, "chunks": chunks}
        arguments |= {"kind": integer(LOSSES.index(kind)), "delta": torch.tensor([0.7])}
        halves = slope.float().chunk(2, 1) if variational else (slope.float(),)
        results = {"loss": expected.detach(), **dict(zip(("slope", "variance_slope"), halves, strict=False))}
        yield Call(
            f"loss {variational} {kind} {noise}", "loss", arguments | ({"variance": v} if variational else {}), results
        )


def scale_calls(x: Tensor, m: Tensor, u: Tensor) -> Iterator[Call]:
    """Calls of x_start_scale, for several quantiles, of x itself and of a predicted x0; and a call of output_scale."""
    table, t, u = make_table(4), torch.tensor([3, 0, 1, 2, 1]), u.to(m.dtype)
    factors = torch.tensor([0.5, 1.5, 2.0, -1.0, 0.0])
    for quantile, maximum in ((0.2, math.inf), (0.995, math.inf), (1.0, 3.0)):
        numbers = {"quantile": torch.tensor([quantile], dtype=torch.float64), "maximum": torch.tensor([maximum])}
        how = {"quantile": quantile, "maximum": maximum}
        arguments = {"x": x, **numbers}
        if x.dtype == m.dtype:
            yield Call(f"x_start_scale {how}", "x_start_scale", arguments, {"scale": ops.x_start_scale(x, **how)})
        arguments |= {"model_output": m, **rows_of(table, t)}
        for given in ({}, {"uncond_output": u, "output_scale": factors}):
            expected = ops.x_start_scale(x, m, table, t, **how, **given)
            what = f"x_start_scale {how} {list(given)}"
            yield Call(what, "x_start_scale", {**arguments, **given}, {"scale": expected})
    if x.dtype == m.dtype and m[0].numel() > 1:
        expected = ops.output_scale(m, u, guidance=3.0, rescale=0.7)
        numbers = {"guidance": torch.tensor([3.0]), "rescale": torch.tensor([0.7], dtype=torch.float64)}
        arguments = {"model_output": m, "uncond_output": u, **numbers}
        yield Call("output_scale", "output_scale", arguments, {"scale": expected})
