"""Determines from a step table's levels which samples it is for. Converts its rows to rows for samples x0 + sigma eps,
and to rows for models that return the predicted clean sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.row_stepper import clip_in_notes
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table import StepTable

__all__ = ["FLOW", "OTHER", "SIGMA_SPACE", "of_denoiser", "scale_of", "table_sigmas"]

SIGMA_SPACE, FLOW, OTHER = "x0 + sigma eps", "(1 - sigma) x0 + sigma eps", "others"  # the kinds of samples
NEAR = 1e-5  # the largest relative difference between levels that count as equal


def scale_of(table: StepTable) -> str:
    """The kind of samples that a table is for: SIGMA_SPACE, FLOW or OTHER.

    Variance-preserving samples and tables without levels are OTHER.
    """
    signal, noise = table.signal_now, table.noise_now
    for scale, unit in ((SIGMA_SPACE, signal), (FLOW, signal + noise)):
        if bool(((unit - 1).abs() < NEAR).all()):
            return scale
    return OTHER


def table_sigmas(table: StepTable) -> tuple[Tensor, StepTable]:
    """The sigma at which each row starts, then the sigma at which the last row ends; and the table with these sigmas.

    The sigmas are float64 (rows + 1,). If the table is for a flow, they are the flow's sigmas, and the table is
    returned unchanged. For other samples a sigma is the noise divided by the signal, and the rows are converted to rows
    for samples x0 + sigma eps.

    Raises:
        ValueError: the table has no levels; a level has no signal, in a table that is not for a flow; a row does not
            start at the level where the previous row ends.

    Examples:
        >>> from ddpm_ext.tables.samplers import ddim
        >>> sigmas, table = table_sigmas(ddim(grid))
        >>> sigmas.round(decimals=2).tolist()
        [157.41, 3.42, 0.01, 0.0]
    """
    signal, noise, signal_after, noise_after = (getattr(table, name) for name in LEVELS)
    if scale_of(table) != FLOW:
        if not bool(((signal > 0) & (signal_after > 0)).all()):
            raise ValueError("the table has no levels, or one without signal, expected some that have sigmas")
        table = table.scaled(1 / signal, 1 / signal_after)
        noise, noise_after = noise / signal, noise_after / signal_after
    if bool(((noise[1:] - noise_after[:-1]).abs() > NEAR * noise_after[:-1]).any()):
        raise ValueError("the table's rows do not start where the rows before them arrive")
    return torch.cat([noise, noise_after[-1:]]), table


def of_denoiser(table: StepTable) -> StepTable:
    """The table's rows for a denoiser: a model that returns the predicted clean sample x0 = a x + b m in place of m.

    Raises:
        ValueError: a row reads more of the model than x0, such as its unconditional output; or the table's notes have a
            clip, and a row reads m itself, which does not follow from a clipped x0.
    """
    m_of_x0 = torch.where(table.b != 0, 1 / table.b, 0)
    reads_m = (table.c2 != 0) | (table.k2 != 0)
    if bool(
        ((table.cu != 0) | (table.l0 != 0) | (table.l1 != 0) | ((reads_m | (table.c0 != 0)) & (table.b == 0))).any()
    ):
        raise ValueError("the table reads more of the model than its predicted clean sample, which a denoiser returns")
    if bool(reads_m.any()) and clip_in_notes(table, None) is not None:
        raise ValueError("the table reads what the model returned before the clip, expected rows that read x0 alone")
    columns: dict[str, Any] = {
        "c0": table.c0 + table.c2 * m_of_x0,
        "c1": table.c1 - table.c2 * m_of_x0 * table.a,
        "k0": table.k0 + table.k2 * m_of_x0,
        "k1": table.k1 - table.k2 * m_of_x0 * table.a,
    }
    zeros, called = torch.zeros_like(table.a), (table.b != 0).to(table.a.dtype)
    return replace(table, **columns, a=zeros, b=called, c2=zeros, k2=zeros, g0=None, g1=None)
