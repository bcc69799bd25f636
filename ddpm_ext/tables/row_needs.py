"""What each row of a step table needs beside its numbers, told on the host before a loop begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.tables.step_table import StepTable


class RowNeeds(NamedTuple):
    """What a step needs.

    Attributes:
        calls_model: False for a jump back, and for noise before a step.
        guided: whether it also needs the model's unconditional output.
        needs_output: whether the step still reads the output once x0 is known.
        noisy: whether it adds noise.
        history: whether it reads each of the three tensors that earlier rows kept.
        keeps: whether it keeps one.
        keeps_output: whether that is the model's output itself, if nothing is clipped.
    """

    calls_model: bool
    guided: bool
    needs_output: bool
    noisy: bool = False
    history: tuple[bool, ...] = (False, False, False)
    keeps: bool = False
    keeps_output: bool = False


def row_needs(table: StepTable, scales: Tensor | None = None) -> list[RowNeeds]:
    """What each row needs. scales: (rows,), those of classifier-free guidance; None: ones."""
    needs_output = (table.c2 != 0) | (table.cu != 0) | (table.k2 != 0)
    calls_model = (table.b != 0) | needs_output
    guided = table.cu != 0 if scales is None else (scales != 1) | (table.cu != 0)
    kept = torch.stack([table.k0, table.k1, table.k2], 1)
    x0_is_output = (table.a == 0) & (table.b == 1)
    keeps_output = (kept[:, 1] == 0) & torch.where(x0_is_output, kept[:, 0] + kept[:, 2], kept[:, 2]).eq(1)
    keeps_output &= x0_is_output | (kept[:, 0] == 0)
    history = torch.stack([table.h1, table.h2, table.h3], 1) != 0
    columns = (calls_model, calls_model & guided, needs_output, table.s != 0, history, kept.ne(0).any(1), keeps_output)
    return [
        RowNeeds(calls, guide, output, noisy, tuple(read), keep, is_output)
        for calls, guide, output, noisy, read, keep, is_output in zip(*(c.tolist() for c in columns), strict=True)
    ]
