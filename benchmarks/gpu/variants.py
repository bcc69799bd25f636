"""Variants of the reverse step that a card must judge: blocks a multiprocessor, the row by value, the noise ahead.

Their kernels are in variants.cu, which is compiled for the card that is there, into a library of its own. The operator
is one of them, so that all are launched alike.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from benchmarks.gpu.ways import GD, MOVED, RNG, Batch, T, Way, p_sample
from benchmarks.static.compiler import load_setup

SOURCE = Path(__file__).with_suffix(".cu")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
VARIANTS = ("as it is", "5 blocks", "row by value", "row by value, noise ahead")
BEHIND = "torch.add, p_sample"  # a launch for whose end the variant need not wait with its noise
MOVED[BEHIND] = ("x", "noise", "m", "x", "m", "out")


def build(folder: Path, arch: str = "native") -> Path:
    """The library. It uses no GPU, since a process that has used CUDA cannot be forked."""
    setup = load_setup()
    nvcc = Path(setup.find_toolkit({}).home or cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    target = folder / "variants.so"
    command = [nvcc, *setup.NVCC_FLAGS, "-std=c++20", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC", f"-I{CSRC}"]
    command += [f"-isystem={path}" for path in cpp_extension.include_paths()]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run([*command, SOURCE, "-lc10", "-lc10_cuda", "-o", target], check=True)
    return target


def step(library: ctypes.CDLL, variant: int, x: Tensor, m: Tensor, out: Tensor, table: Tensor, row: Tensor) -> Tensor:
    """One launch on the current stream. table: float32 (rows, 8), on x's device; row: its row T on the CPU."""
    run = library.ddpm_ext_variant
    run.restype = ctypes.c_char_p
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, m, out)]
    error = run(
        ctypes.c_int(variant),
        *pointers,
        ctypes.c_int(x.dtype == torch.bfloat16),
        *(ctypes.c_int64(n) for n in (len(x), x[0].numel())),
        ctypes.c_void_p(table.data_ptr()),
        *(ctypes.c_int64(n) for n in (len(table), T)),
        ctypes.c_void_p(row.data_ptr()),
        *(ctypes.c_float(bound) for bound in (-1.0, 1.0)),
        ctypes.c_uint64(RNG.seed_value),
        ctypes.c_void_p(stream),
    )
    if error:
        raise RuntimeError(error.decode())
    return out


@functools.cache
def rows(device: torch.device) -> Tensor:
    """The table of rows, float32 (timesteps, 8)."""
    return GD.process.tables.get("steps", device, torch.float32)


def variant(library: ctypes.CDLL | None, number: int, b: Batch) -> Tensor:
    """By the library; without one, where there is no GPU, the operator."""
    if library is None:
        return p_sample(b, rng=RNG, out=b.out)
    table = rows(b.x.device)
    return step(library, number, b.x, b.m, b.out, table, rows(torch.device("cpu"))[T])


def behind(library: ctypes.CDLL | None, number: int, b: Batch) -> Tensor:
    torch.add(b.x, b.noise, out=b.m)
    return variant(library, number, b)


@functools.cache
def load(folder: Path | None) -> ctypes.CDLL | None:
    """The library in a folder, where the first row's process builds it. Of no folder: none."""
    if folder is None:
        return None
    library = folder / "variants.so"
    return ctypes.CDLL(str(library if library.is_file() else build(folder)))


def variants(folder: Path | None) -> Iterator[Way]:
    for number, name in enumerate(VARIANTS):
        for operation, call in (("p_sample", variant), (BEHIND, behind)):
            way = f"ddpm_ext, variant: {name}"
            yield Way(operation, way, lambda b, call=call, number=number: call(load(folder), number, b))
