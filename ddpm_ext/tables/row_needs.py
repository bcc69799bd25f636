"""row_needs: for each row of a step table, whether it needs a model call, noise or history.

A loop computes this once on the host, before it begins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ddpm_ext.tables.step_table import StepTable


class RowNeeds(NamedTuple):
    """The inputs that the step of a row needs, and whether it keeps a tensor.

    Attributes:
        calls_model: whether the step calls the model. A jump back and a row that only adds noise do not.
        guided: whether the step also needs the model's unconditional output.
        needs_output: whether the step reads the guided or the unconditional output other than to compute x0.
        noisy: whether the step adds noise.
        history: for each of H1, H2 and H3, whether the step reads it.
        keeps: whether the step keeps a tensor for later rows.
        keeps_output: whether the kept tensor is the model output itself, provided that x0 is a x + b m, neither clipped
            nor replaced nor moved by a gradient.
    """

    calls_model: bool
    guided: bool
    needs_output: bool
    noisy: bool = False
    history: tuple[bool, ...] = (False, False, False)
    keeps: bool = False
    keeps_output: bool = False


def row_needs(table: StepTable, scales: Tensor | None = None) -> list[RowNeeds]:
    """The RowNeeds of each row.

    scales: (rows,), the scales of classifier-free guidance. None means ones.
    """
    names = ("a", "b", "c2", "cu", "s", "h1", "h2", "h3", "k0", "k1", "k2")
    values = np.array([getattr(table, name).numpy(force=True) for name in names])
    a, b, c2, cu, s, h1, h2, h3, k0, k1, k2 = values != 0
    b_value, k0_value, k2_value = values[[1, 8, 10]]
    needs_output = c2 | cu | k2
    calls_model = b | needs_output
    guided = cu if scales is None else (scales.cpu().numpy() != 1) | cu
    x0_is_output = ~a & (b_value == 1)
    keeps_output = ~k1 & (np.where(x0_is_output, k0_value + k2_value, k2_value) == 1) & (x0_is_output | ~k0)
    columns = (calls_model, calls_model & guided, needs_output, s, h1, h2, h3, k0 | k1 | k2, keeps_output)
    rows = list(zip(*np.array(columns).tolist(), strict=True))
    # A long loop has few distinct rows, which share their RowNeeds.
    needs_of = {row: RowNeeds._make((*row[:4], row[4:7], *row[7:])) for row in set(rows)}
    return [needs_of[row] for row in rows]
