"""What a traced scheduler would hold in the middle of a loop, had diffusers' own code taken the steps before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_plan import Plan
from ddpm_ext.tables.trace_random import LINEAR, Array, flat, relative

HELD = 4  # what as many rows kept is held, one more than rows read: as many as any of diffusers' schedulers reads


def tensors_after(
    plan: Plan, i: int, x: Tensor, m: Tensor, prev: Tensor, ring: Sequence[Tensor]
) -> tuple[dict[str, Any], bool]:
    """The tensors among the scheduler's attributes after row i: each a sum of the row's sample x, its output m, its
    result and what it and the rows before it kept. One that is no such sum is NaN.

    Returns them by their names, and whether all are known.

    The factors are those of the loop on random numbers that the rows were traced with.
    """
    step = plan.trace.steps[i]
    numbers = [*_ring(plan, i)[: len(ring)], *_inputs(plan, i), flat(step.result.prev)]
    tensors = [*ring, x, m, prev]
    unused = [] if plan.trace.noise[i] is not None else [flat(z) for z, _ in step.draws]
    shape = step.result.prev.shape
    unknown = torch.full_like(x, torch.nan, dtype=torch.promote_types(x.dtype, m.dtype))

    def restored(value: Any, age: int) -> Any:
        """The value for the loop's own numbers. age: how many were stored after it."""
        if not isinstance(value, Tensor) or value.shape != shape:
            return value  # such as a timestep
        factors = _factors(flat(value), numbers, max(LINEAR, 10 * plan.trace.residual))
        if factors is None:
            # Where a list has no end, its scheduler reads the last ones alone; and noise that a step did not use is 0.
            if age < HELD and not any(np.array_equal(flat(value), z) for z in unused):
                return unknown
            factors = {}
        terms = (factor * tensors[k].to(unknown.dtype) for k, factor in factors.items())
        return sum(terms, torch.zeros_like(unknown))

    found = {
        name: [restored(value, len(held) - 1 - k) for k, value in enumerate(held)]
        if isinstance(held, list)
        else restored(held, 0)
        for name, held in step.tensors.items()
    }
    lists = (held if isinstance(held, list) else [held] for held in found.values())
    return found, not any(value is unknown for values in lists for value in values)


def _inputs(plan: Plan, i: int) -> tuple[Array, Array]:
    """Sample and output of row i, for the random numbers."""
    step = plan.trace.steps[i]
    assert step.sample is not None and step.output is not None
    return flat(step.sample), flat(step.output)


def _ring(plan: Plan, i: int) -> list[Array]:
    """What rows kept up to row i, the newest first, for the random numbers."""
    ring: list[Array] = []
    table = plan.rows.table
    for j in range(i + 1):
        if plan.rows.needs[j].keeps:
            x, m = _inputs(plan, j)
            x0 = table.a[j].item() * x + table.b[j].item() * m
            if plan.trace.clip is not None:
                x0 = np.clip(x0, *plan.trace.clip)
            ring.insert(0, table.k0[j].item() * x0 + table.k1[j].item() * x + table.k2[j].item() * m)
    return ring


def _factors(target: Array, numbers: Sequence[Array], bound: float) -> dict[int, float] | None:
    """Factors of as few of the numbers as give the target."""
    for count in range(1 + len(numbers)):
        for read in itertools.combinations(range(len(numbers)), count):
            columns = np.stack([numbers[k] for k in read] or [np.zeros_like(target)], 1)
            factors = np.linalg.lstsq(columns, target, rcond=1e-13)[0]
            parts = np.abs(columns) @ np.abs(factors)
            if relative(np.abs(target - columns @ factors), np.maximum(parts, np.abs(target))) <= bound:
                return dict(zip(read, map(float, factors), strict=False))
    return None
