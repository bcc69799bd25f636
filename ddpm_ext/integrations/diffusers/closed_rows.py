"""The rows of some schedulers of diffusers from their own levels, in closed form and without a trace.

So their first loop costs hardly more than any other: a trace takes longer than a loop of their own steps. As there, the
scheduler's own steps on random numbers prove the rows; see closed_proof.py. What an expression does not cover is
traced, and so is a class whose methods are not diffusers' own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.closed_factors import WIDE, Factors, Form, Uncovered, Untraceable
from ddpm_ext.integrations.diffusers.closed_forms import FORMS, WITH_OPTIONS
from ddpm_ext.integrations.diffusers.closed_proof import Loop, Numbers, Steps, proven_steps
from ddpm_ext.integrations.diffusers.scheduler import is_diffusers, own_methods
from ddpm_ext.integrations.diffusers.step_options import Options, of_steps
from ddpm_ext.tables.trace import NoRow, TraceResult
from ddpm_ext.tables.trace_batch import Array
from ddpm_ext.tables.trace_linear import Ints, columns_of, rings_of

METHODS = (
    "step", "step_pred", "scale_model_input", "index_for_timestep", "_init_step_index",
    "get_scalings_for_boundary_condition_discrete", "convert_model_output", "_sigma_to_alpha_sigma_t",
    "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update", "step_plms", "_get_prev_sample",
    "singlestep_dpm_solver_update", "singlestep_dpm_solver_second_order_update",
    "singlestep_dpm_solver_third_order_update", "precondition_inputs", "precondition_outputs", "_get_conditioning_c_in",
    "get_scalings_for_boundary_condition", "get_variables", "get_mult", "_get_variance", "_alpha_cumprod",
    "previous_timestep", "get_adjacent_sigma",
)  # fmt: skip
CACHED = 64  # kinds of loops
ALIKE = 100  # steps in a loop of such a kind, or fewer

_steps: BoundedCache[Steps] = BoundedCache(CACHED)


def closed(
    scheduler: Any, first: int, timesteps: Tensor, dims: int, options: Options = ()
) -> tuple[TraceResult, Steps] | None:
    """What `follow` finds. None where it is to be traced; raises NoRow where that would be in vain.

    Args:
        scheduler: an object of diffusers' class, on the CPU, as a loop begins; it stays as it is.
        first: the place of the first of `timesteps` among its own, of which they are all that follow, (steps,), or
            (steps, 1) where each has a dimension.
        dims: how many dimensions samples have.
        options: of the steps.
    """
    cls: Any = type(scheduler)
    form = WITH_OPTIONS.get((cls.__name__, options)) if options else FORMS.get(cls.__name__)
    methods = own_methods(cls, _methods_of(cls))
    is_own = methods is not None and is_diffusers(cls) and vars(scheduler).keys().isdisjoint(METHODS)
    if form is None or not is_own or torch.get_default_dtype() is not torch.float32:
        return None
    has_dim = timesteps.dim() > 1
    if form.is_of_intervals and not has_dim:
        return None
    timesteps = timesteps[:-1] if form.is_of_intervals else timesteps
    try:
        factors = form.factors(scheduler, first)
        history, rings = _history(factors)
        _check(scheduler, form, first, len(timesteps), factors, history)
        settings = tuple([getattr(scheduler.config, name, None) for name in form.settings])
        n = len(timesteps)
        rows = -(-n // ALIKE) * ALIKE if form.alike and n > 1 else n
        kind: Any = None
        if not form.alike:
            added = (factors.s != 0).tobytes(), b"" if factors.given is None else (factors.given != 0).tobytes()
            kind = tuple(factors.draws), added, rings.tobytes()
        key = cls, methods, settings, options, first, rows, kind, dims, has_dim

        def prove() -> Steps:
            of_each = of_steps(options, scheduler.timesteps, first, n)
            loop = Loop(form, first, timesteps, of_each, factors, history, rings, Numbers.of(dims))
            return proven_steps(scheduler, loop, rows)

        found = _steps.get_or_make(key, prove)
    except Untraceable as why:
        raise NoRow(str(why), form.reads) from None
    except Exception:  # which a trace explains
        return None
    clean, clipped = factors.clean, factors.clipped
    if clipped is not None:
        a, b = clipped.clean.T
        columns = {"a": a, "b": b, "c0": clipped.factor, "c1": factors.x, "c2": factors.m}
    elif clean is not None:
        columns = columns_of(factors.x, factors.m, clean)
    else:
        columns = {"c1": factors.x, "c2": factors.m}
    # By way of the clean sample, a row that has nothing of its own sample would subtract that again.
    if clean is not None and history:
        direct = (rings >= 0).any(1) & (factors.x == 0)
        for name, values in (("c0", factors.x), ("c1", factors.x), ("c2", factors.m)):
            columns[name] = np.where(direct, values, columns[name])
    times = scheduler.timesteps.numpy()[first : first + n]
    columns |= {"s": factors.s, "timestep": times.astype(WIDE if times.dtype.kind == "f" else np.int64)}
    trace, dt = found.trace, factors.dt
    steps, own = trace.steps[:n], factors.own or trace.own[:n]
    if dt is not None:
        steps = [
            step if step.state.get("dt") is None else step._replace(state=step.state | {"dt": length})
            for step, length in zip(steps, dt.unbind(), strict=True)
        ]
    columns |= history if factors.given is None else {"h1": factors.given}
    noise, given = trace.noise[:n], trace.given[:n]
    whole = TraceResult(
        columns, trace.clip, trace.residual, steps, noise, given, trace.second, own, factors.scales, read=trace.read
    )  # in half the time of _replace
    return whole, found


@functools.lru_cache(64)
def _methods_of(cls: type) -> tuple[str, ...]:
    return tuple(name for name in METHODS if hasattr(cls, name))


def _history(factors: Factors) -> tuple[dict[str, Array], Ints]:
    """The columns by which rows keep a tensor and read those of earlier rows, and the steps that each row reads,
    (steps, tensors), -1 for none. A tensor is in proportion as in the row that reads most of it, with 1 as the larger
    factor."""
    n, past = len(factors.x), factors.past
    if past is None:
        return {}, np.empty((n, 0), np.int64)
    if not past.any():
        return {}, np.full((n, past.shape[1]), -1)
    stores = np.ones(n, bool)
    if factors.skips is not None:
        stores[factors.skips] = False
    reads = past.any(2)
    rings = np.where(reads, rings_of(stores)[:, : past.shape[1]], -1)
    sizes = np.abs(past).max(2)
    scales = np.max([np.abs(factors.x), np.abs(factors.m), sizes.max(1)], 0)
    kept, largest = np.zeros((n, 2)), np.zeros(n)
    for k, ring in enumerate(rings.T):
        share = sizes[:, k] / scales
        i = np.flatnonzero((ring >= 0) & (share > largest[ring]))
        kept[ring[i]], largest[ring[i]] = past[i, k] / scales[i, None], share[i]
    keeps = largest > 0
    kept[keeps] /= kept[keeps, np.abs(kept[keeps]).argmax(1)][:, None]
    if past.shape[1] > 1 and (rings_of(keeps)[:, : past.shape[1]][reads] != rings[reads]).any():
        raise Uncovered
    columns = {"k1": kept[:, 0], "k2": kept[:, 1]}
    for k, ring in enumerate(rings.T):
        i = np.flatnonzero(ring >= 0)
        own = kept[ring[i]]
        column = columns[f"h{1 + k}"] = np.zeros(n)
        column[i] = (past[i, k] * own).sum(1) / (own * own).sum(1)
    return columns, rings


def _check(scheduler: Any, form: Form, first: int, n: int, factors: Factors, history: Mapping[str, Array]) -> None:
    """Raises Uncovered for a loop that begins elsewhere, and for numbers that are no steps'."""
    state = vars(scheduler)
    begin = None if form.counter is None else state[form.counter]
    begin = state.get("_begin_index") if begin is None else begin
    if begin is None:
        times = scheduler.timesteps.tolist()
        begin = times.index(times[first])
        if times.count(times[first]) > 1:  # the second one, where an image is denoised from there
            begin = times.index(times[first], begin + 1)
    numbers = [factors.x, factors.m, factors.s, *(() if factors.clean is None else factors.clean.T), *history.values()]
    numbers += [] if factors.clipped is None else [*factors.clipped.clean.T, factors.clipped.factor]
    numbers += [] if factors.given is None else [factors.given]
    # A number that is not finite makes such a sum of squares.
    if begin != first or not all([len(each) == n and math.isfinite(each.dot(each)) for each in numbers]):
        raise Uncovered
