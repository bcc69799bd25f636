"""Packed rows of random numbers, and a tensor for every input of a step with options."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.ops.step_inputs import InputKind, names

LIKE_X, OF_MODEL, PER_SAMPLE = map(names, (InputKind.LIKE_X, InputKind.OF_MODEL, InputKind.PER_SAMPLE))
RESULTS = ("out", *names(InputKind.RESULT, InputKind.MODEL_INPUT))
READ = ("x_t", "model_output", "noise", *LIKE_X, *OF_MODEL)  # all tensors of x_t's shape that a step reads


def make_table(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32, **numbers: float) -> Tensor:
    """A table (rows, 24) of random numbers, with `numbers` as given.

    Every third row has no c2, every fourth no noise, every second no guidance, and of cu, of each history and of each
    factor of what is kept some rows have none. Draws reach 2^32.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    table[::3, ROW.index("c2")] = table[::4, ROW.index("s")] = 0
    table[::2, ROW.index("w")] = 1
    table[:, [ROW.index("l0"), ROW.index("l1")]] *= 0.3  # these are exponents: e to their power stays small
    for offset, name in enumerate(("cu", "h1", "h2", "h3", "k0", "k1", "k2")):
        table[offset % 5 :: 5, ROW.index(name)] = 0
    draws = torch.randint(2**32, (rows,), generator=generator)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    table.view(bits)[:, ROW.index("draw")] = draws.to(bits)
    for name, value in numbers.items():
        table[:, ROW.index(name)] = value
    return table


def make_row(**numbers: float) -> Tensor:
    """A table of one row, (1, 24). Unless `numbers` says otherwise, w and c_in are 1 (no effect), all others 0."""
    row = torch.zeros(1, WIDTH)
    for name, value in {"w": 1.0, "c_in": 1.0, **numbers}.items():
        row[0, ROW.index(name)] = value
    return row


def options(shape: tuple[int, ...], dtype: torch.dtype, model_dtype: torch.dtype, seed: int = 9) -> dict[str, Tensor]:
    """All tensors that a step can read besides x_t, the model's output and the noise."""

    def normal(number: int, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(100 * seed + number))

    found = {name: normal(i, *shape).to(dtype) for i, name in enumerate(LIKE_X)}
    found["mask"] = normal(10, *shape).sigmoid().to(dtype)
    found |= {name: normal(20 + i, *shape).to(model_dtype) for i, name in enumerate(OF_MODEL)}
    return found | {name: normal(30 + i, shape[0]) for i, name in enumerate(PER_SAMPLE)}
