"""What each row of a step table needs beside its numbers, told on the host before a loop begins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
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
    names = ("a", "b", "c2", "cu", "s", "h1", "h2", "h3", "k0", "k1", "k2")
    a, b, c2, cu, s, h1, h2, h3, k0, k1, k2 = (getattr(table, name).cpu().numpy() for name in names)
    needs_output = (c2 != 0) | (cu != 0) | (k2 != 0)
    calls_model = (b != 0) | needs_output
    guided = cu != 0 if scales is None else (scales.cpu().numpy() != 1) | (cu != 0)
    x0_is_output = (a == 0) & (b == 1)
    keeps_output = (k1 == 0) & (np.where(x0_is_output, k0 + k2, k2) == 1) & (x0_is_output | (k0 == 0))
    history = np.stack([h1, h2, h3], 1) != 0
    keeps = (k0 != 0) | (k1 != 0) | (k2 != 0)
    columns = (calls_model, calls_model & guided, needs_output, s != 0, history, keeps, keeps_output)
    return [
        RowNeeds(calls, guide, output, noisy, tuple(read), keep, is_output)
        for calls, guide, output, noisy, read, keep, is_output in zip(*(c.tolist() for c in columns), strict=True)
    ]
