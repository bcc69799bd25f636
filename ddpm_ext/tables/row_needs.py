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
    """

    calls_model: bool
    guided: bool
    needs_output: bool
    noisy: bool = False
    history: tuple[bool, ...] = (False, False, False)
    keeps: bool = False


def row_needs(table: StepTable, scales: Tensor | None = None) -> list[RowNeeds]:
    """The RowNeeds of each row.

    scales: (rows,), the scales of classifier-free guidance. None means ones.
    """
    names = ("b", "c2", "cu", "s", "h1", "h2", "h3", "k0", "k1", "k2")
    b, c2, cu, s, h1, h2, h3, k0, k1, k2 = np.array([getattr(table, name).numpy(force=True) for name in names]) != 0
    needs_output = c2 | cu | k2
    calls_model = b | needs_output
    guided = cu if scales is None else (scales.cpu().numpy() != 1) | cu
    columns = (calls_model, calls_model & guided, needs_output, s, h1, h2, h3, k0 | k1 | k2)
    rows = list(zip(*np.array(columns).tolist(), strict=True))
    # A long loop has few distinct rows, which share their RowNeeds.
    needs_of = {row: RowNeeds._make((*row[:4], row[4:7], *row[7:])) for row in set(rows)}
    return [needs_of[row] for row in rows]
