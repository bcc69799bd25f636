"""A table of random rows and a tensor for every option, for the tests of the extended step."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.ops.extended_inputs import EXTENDED_INPUTS
from ddpm_ext.ops.input_kinds import Kind, names

OPERATOR, INPUTS = "extended_step", EXTENDED_INPUTS
COLUMNS = ("a", "b", "c0", "c1", "c2", "s", "draw", "c3", "l0", "l1", "g0", "g1", "k0", "k1", "w")
LIKE_X, OF_MODEL, PER_SAMPLE = (names(EXTENDED_INPUTS, kind) for kind in (Kind.LIKE_X, Kind.OF_MODEL, Kind.PER_SAMPLE))
RESULTS = ("out", *names(EXTENDED_INPUTS, Kind.RESULT))


def make_table(rows: int, seed: int = 0, **columns: float) -> Tensor:
    """A table (rows, 16) of random numbers, with `columns` as given.

    Every third row has no c2, every fourth no noise, every fifth no history, every second no guidance.
    Draws reach 2^32.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 16, generator=generator)
    table[::3, 4] = table[::4, 5] = table[::5, 7] = 0
    table[:, 8:10] *= 0.3  # these are exponents: e to their power stays small
    table[::2, 14] = 1
    table.view(torch.int32)[:, 6] = torch.randint(-(2**31), 2**31, (rows,), generator=generator)
    for name, value in columns.items():
        table[:, COLUMNS.index(name)] = value
    return table


def make_row(**columns: float) -> Tensor:
    """A table (1, 16): no guidance, and zeros in all other columns that are not given."""
    row = torch.zeros(1, 16)
    for name, value in {"w": 1.0, **columns}.items():
        row[0, COLUMNS.index(name)] = value
    return row


def options(shape: tuple[int, ...], dtype: torch.dtype, model_dtype: torch.dtype, seed: int = 9) -> dict[str, Tensor]:
    """All tensors that a step can read besides x, the model's output and the noise."""

    def normal(number: int, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(100 * seed + number))

    found = {name: normal(i, *shape).to(dtype) for i, name in enumerate(LIKE_X)}
    found["mask"] = normal(10, *shape).sigmoid().to(dtype)
    found |= {name: normal(20 + i, *shape).to(model_dtype) for i, name in enumerate(OF_MODEL)}
    return found | {name: normal(30 + i, shape[0]) for i, name in enumerate(PER_SAMPLE)}
