"""at_any_scale, a decorator that makes a sampler for variance-preserving samples accept grids of any scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.step_table import StepTable


def at_any_scale(sampler: Callable[..., StepTable]) -> Callable[..., StepTable]:
    """Decorates a sampler for variance-preserving samples, so that it accepts grids of any scale.

    The rows are made for variance-preserving samples, then scaled. The decorated sampler raises TypeError if its grid
    is neither a Grid nor Jumps.
    """

    @wraps(sampler)
    def scaled(grid: Any, **options: Any) -> StepTable:
        if not isinstance(grid, Grid | Jumps):
            raise TypeError(f"{sampler.__name__}: grid is a {type(grid).__name__}, expected a Grid")
        if grid.scale is None:
            return sampler(grid, **options)
        table = sampler(grid.unscaled(), **options)
        before = grid.scale(table.signal_now, table.noise_now)
        return table.scaled(before, grid.scale(table.signal_after, table.noise_after))

    return scaled
