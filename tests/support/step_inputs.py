"""Step tables of random numbers, and random tensors for every optional input of the step with options."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.ops.step_inputs import InputKind, names

LIKE_X, OF_MODEL, PER_SAMPLE = map(names, (InputKind.LIKE_X, InputKind.OF_MODEL, InputKind.PER_SAMPLE))
RESULTS = ("out", *names(InputKind.RESULT, InputKind.MODEL_INPUT))
READ = ("x_t", "model_output", "noise", *LIKE_X, *OF_MODEL)  # all tensors with the shape of x_t that a step reads


def make_table(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32, **numbers: float) -> Tensor:
    """A step table of random numbers, (rows, 24). `numbers` are columns with the same value in every row.

    c2 is 0 in every third row, s in every fourth row, and w is 1 (no guidance) in every second row. cu, h1, h2, h3 and
    k0 are 0 in every fifth row, each in other rows. k1 is 0 where cu is, and k2 where h1 is. Draws are integers in
    [0, 2^32).
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    table[::3, ROW.index("c2")] = table[::4, ROW.index("s")] = 0
    table[::2, ROW.index("w")] = 1
    table[:, [ROW.index("l0"), ROW.index("l1")]] *= 0.3  # exponents of e: larger numbers would make the deviations huge
    for offset, name in enumerate(("cu", "h1", "h2", "h3", "k0", "k1", "k2")):
        table[offset % 5 :: 5, ROW.index(name)] = 0
    draws = torch.randint(2**32, (rows,), generator=generator)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    table.view(bits)[:, ROW.index("draw")] = draws.to(bits)
    for name, value in numbers.items():
        table[:, ROW.index(name)] = value
    return table


def make_row(**numbers: float) -> Tensor:
    """A table of one row, (1, 24), with these numbers. By default w and c_in are 1 (no effect), the others 0."""
    row = torch.zeros(1, WIDTH)
    for name, value in {"w": 1.0, "c_in": 1.0, **numbers}.items():
        row[0, ROW.index(name)] = value
    return row


def options(shape: tuple[int, ...], dtype: torch.dtype, model_dtype: torch.dtype, seed: int = 9) -> dict[str, Tensor]:
    """Random tensors for all optional inputs of the step with options except the noise, by name."""

    def normal(number: int, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(100 * seed + number))

    tensors = {name: normal(i, *shape).to(dtype) for i, name in enumerate(LIKE_X)}
    tensors["mask"] = normal(10, *shape).sigmoid().to(dtype)
    tensors |= {name: normal(20 + i, *shape).to(model_dtype) for i, name in enumerate(OF_MODEL)}
    return tensors | {name: normal(30 + i, shape[0]) for i, name in enumerate(PER_SAMPLE)}
