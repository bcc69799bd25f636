"""The rows of some schedulers of diffusers from their own levels, in closed form and without a trace.

So their first loop costs hardly more than any other: a trace takes longer than a loop of their own steps. As there, the
scheduler's own steps on random numbers prove the rows: here the first and the last one, and of those that read steps
before them some more, of the first loop of each kind, which are those of a class, its settings and a number of
steps. What an expression does not cover is traced, and so is a class whose methods are not diffusers' own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.closed_factors import WIDE, Factors, Uncovered
from ddpm_ext.integrations.diffusers.closed_forms import FORMS, Form
from ddpm_ext.integrations.diffusers.scheduler import is_diffusers, own_methods
from ddpm_ext.integrations.shared import new
from ddpm_ext.tables.row_needs import RowNeeds
from ddpm_ext.tables.trace import TraceResult
from ddpm_ext.tables.trace_batch import ROUNDED, Array, flat, relative
from ddpm_ext.tables.trace_linear import HISTORY, Ints, columns_of, rings_of
from ddpm_ext.tables.trace_run import Step, on_cpu, parameters_of, parts_of, step_of
from ddpm_ext.tables.trace_watch import copied

METHODS = (
    "step", "scale_model_input", "index_for_timestep", "_init_step_index",
    "get_scalings_for_boundary_condition_discrete", "convert_model_output", "_sigma_to_alpha_sigma_t",
    "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update", "step_plms", "_get_prev_sample",
    "singlestep_dpm_solver_update", "singlestep_dpm_solver_second_order_update", "precondition_inputs",
    "precondition_outputs", "_get_conditioning_c_in",
)  # fmt: skip
CACHED = 64  # kinds of loops
TRIED = 8  # random numbers in a proof
NONE: Any = object()  # a generator that nobody can draw by


class Steps(NamedTuple):
    """What is the same for all levels: of a class with these methods and settings, and a loop of as many steps.

    Attributes:
        trace: what `follow` finds of them, without numbers.
        dtypes: as TracedRows has them, of all such loops.
        needs: what the rows need.
    """

    trace: TraceResult
    dtypes: dict[Any, Any]
    needs: list[RowNeeds]


_steps: BoundedCache[Steps] = BoundedCache(CACHED)


def closed(scheduler: Any, first: int, timesteps: Tensor, dims: int) -> tuple[TraceResult, Steps] | None:
    """What `follow` finds. None where it is to be traced.

    Args:
        scheduler: an object of diffusers' class, on the CPU, as a loop begins; it stays as it is.
        first: the place of the first of `timesteps` among its own, of which they are all that follow.
        dims: how many dimensions samples have.
    """
    cls: Any = type(scheduler)
    form, methods = FORMS.get(cls.__name__), own_methods(cls, METHODS)
    is_own = methods is not None and is_diffusers(cls) and vars(scheduler).keys().isdisjoint(METHODS)
    if form is None or not is_own or torch.get_default_dtype() is not torch.float32:
        return None
    try:
        factors = form.factors(scheduler, first)
        history, rings = _history(factors)
        _check(scheduler, form, first, len(timesteps), factors, history)
        settings = tuple([getattr(scheduler.config, name, None) for name in form.settings])
        key = cls, methods, settings, first, tuple(factors.noisy), (factors.s != 0).tobytes(), rings.tobytes(), dims
        loop = Loop(form, first, timesteps, factors, history, rings, dims)
        found = _steps.get_or_make(key, lambda: _tried(scheduler, loop))
    except Exception:  # which a trace explains
        return None
    clean = factors.clean
    columns = {"c1": factors.x, "c2": factors.m} if clean is None else columns_of(factors.x, factors.m, clean)
    # By way of the clean sample, a row that has nothing of its own sample would subtract that again.
    if clean is not None and history:
        direct = (rings >= 0).any(1) & (factors.x == 0)
        for name, values in (("c0", factors.x), ("c1", factors.x), ("c2", factors.m)):
            columns[name] = np.where(direct, values, columns[name])
    times = scheduler.timesteps.numpy()[first:]
    columns |= {"s": factors.s, "timestep": times.astype(WIDE if times.dtype.kind == "f" else np.int64)}
    trace, dt = found.trace, factors.dt
    steps, own = trace.steps, trace.own if factors.own is None else factors.own
    if dt is not None:
        steps = [
            step if step.state.get("dt") is None else step._replace(state=step.state | {"dt": length})
            for step, length in zip(steps, dt.unbind(), strict=True)
        ]
    return trace._replace(columns=columns | history, scales=factors.scales, steps=steps, own=own), found


def _history(factors: Factors) -> tuple[dict[str, Array], Ints]:
    """The columns by which rows keep a tensor and read those of earlier rows, and the steps that each row reads,
    (steps, tensors), -1 for none. A tensor is in proportion as in the row that reads most of it, with 1 as the larger
    factor."""
    n, past = len(factors.x), factors.past
    if past is None or not past.any():
        return {}, np.full((n, 0), -1)
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
        times = scheduler.timesteps.numpy()
        begin = (times == times[first]).nonzero()[0][:2][-1]  # the second one, where an image is denoised from there
    numbers = [factors.x, factors.m, factors.s, *(() if factors.clean is None else factors.clean.T), *history.values()]
    # A number that is not finite makes such a sum of squares.
    if begin != first or not all([len(each) == n and math.isfinite(each.dot(each)) for each in numbers]):
        raise Uncovered


class Numbers(NamedTuple):
    """What a proof takes. Nobody may write to it.

    Attributes:
        tensors: samples and outputs of one number each, as many as any step's result hangs on, past a step that it does
            not read, and the noise that a generator with the seed 0 draws first.
        values: these, (tensors, TRIED).
        following: what it draws then.
    """

    tensors: tuple[Tensor, ...]
    values: Array
    following: float

    @staticmethod
    @functools.cache
    def of(dims: int) -> Numbers:
        generator = torch.Generator().manual_seed(1)
        shape = TRIED, *[1] * (dims - 1)
        kinds = [torch.randn(shape, generator=generator, device="cpu") for _ in range(2 * (2 + HISTORY))]
        z = torch.randn(shape, generator=generator.manual_seed(0), device="cpu")
        following = torch.rand((), generator=generator, device="cpu").item()
        return Numbers((*kinds, z), np.array([flat(y) for y in (*kinds, z)]), following)


class Loop(NamedTuple):
    """What is proven.

    Attributes:
        form, factors: of its steps.
        first, timesteps: as `closed` has them.
        history, rings: as `_history` gives them.
        dims: how many dimensions samples have.
    """

    form: Form
    first: int
    timesteps: Tensor
    factors: Factors
    history: dict[str, Array]
    rings: Ints
    dims: int

    def counted(self, i: int) -> dict[str, int]:
        """What counts the steps, after step i."""
        return {} if self.form.counter is None else {self.form.counter: self.first + 1 + i}


def _tried(scheduler: Any, loop: Loop) -> Steps:
    """What the steps do beside their factors, once some have shown that these are theirs. Raises Uncovered where they
    are not."""
    factors, names = loop.factors, loop.form.reads
    own, n, noisy = new(type(scheduler)), len(loop.timesteps), factors.noisy
    adds = [draws and bool(s) for draws, s in zip(noisy, factors.s, strict=True)]
    own.__dict__.update({name: copied(vars(scheduler)[name]) for name in names})
    with on_cpu():
        steps = _run(own, loop)
    for i in range(len(steps), n):
        like, drawn = steps[-factors.period], [torch.float32] * noisy[i]
        kept = like.state if factors.period > 1 else {}
        steps.append(like._replace(draws=drawn, state=kept | loop.counted(i)))
    reads = np.zeros((n, HISTORY), bool)
    reads[:, : loop.rings.shape[1]] = loop.rings >= 0
    keeps = np.zeros(n + 1, bool)
    keeps[loop.rings] = True  # and behind them all, for those that read nothing
    needs = [
        RowNeeds(calls_model=True, guided=False, needs_output=True, noisy=adds[i], history=tuple(read),
                 keeps=keep, keeps_output=keep and steps[i].holds_output)
        for i, (read, keep) in enumerate(zip(reads.tolist(), keeps[:-1].tolist(), strict=True))
    ]  # fmt: skip
    noise, is_clean = [0 if added else None for added in adds], factors.clean is not None
    trace = TraceResult({}, None, ROUNDED, steps, noise, [[]] * n, is_clean, [0.0] * n, read=names)
    return Steps(trace, {}, needs)


def _run(own: Any, loop: Loop) -> list[Step]:
    """What the first steps do, up to the first that reads as many others as any. From there on, a step changes its
    index alone, or what the one a period before it does. Raises Uncovered where a step is not that of its factors, or
    does more.

    own: an object whose steps are run.
    """
    _, _, timesteps, factors, history, rings, dims = loop
    n, scales, stores = len(timesteps), factors.scales, factors.past is not None
    depth = 0 if factors.past is None else factors.past.shape[1]
    full = (rings >= 0).all(1)
    told = 1 + (int(full.argmax()) if rings.size and full.any() else depth)
    # A step is tried after those that it reads, and with other numbers.
    period, dt = factors.period, factors.dt
    tried = sorted({*range(told), *range((n - 1 - depth) // period * period, n)}.intersection(range(n)))
    tensors, values, following = Numbers.of(dims)
    kinds = len(values) - 1  # the last one is noise
    basis = np.eye(len(values))
    scale = getattr(own, "scale_model_input", None)
    draws = {"generator": NONE} if "generator" in parameters_of(type(own).step) else {}
    steps: list[Step] = []
    found: list[Tensor] = []
    weights: list[Array] = []
    stored: dict[int, Array] = {}  # by a step's number
    for turn, i in enumerate(tried):
        if turn:
            vars(own).update(loop.counted(i - 1))
        at_x, at_m = 2 * turn % kinds, (2 * turn + 1) % kinds
        x, m, of_x, of_m = tensors[at_x], tensors[at_m], basis[at_x], basis[at_m]
        if factors.own is not None and factors.own[i]:
            x, of_x = found[-1], weights[-1]  # in whose place the step reads what it was made of
        scaled = x if scale is None else scale(x, timesteps[i])
        before, noisy = vars(own).copy(), factors.noisy[i]
        generator = torch.Generator().manual_seed(0) if noisy else None
        options = draws | ({"generator": generator} if noisy else {}) | ({"return_dict": False} if turn else {})
        result, prev, second = parts_of(own.step(m, timesteps[i], x, **options))
        step = step_of(own, result, m, before, [torch.float32] * noisy, 0, {})
        length = None if dt is None or i % period else dt[i]
        counted = loop.counted(i)
        if not counted.items() <= step.state.items() or step.stores != (stores and i % period == 0):
            raise Uncovered
        if step.state.get("dt") != length:
            raise Uncovered
        if turn >= told:
            like = steps[told - 1 - (told - 1 - i) % period]
            keys = like.state.keys() if period > 1 else counted.keys()
            if (step.state.keys(), step.tensors, step.holds_output) != (keys, like.tensors, like.holds_output):
                raise Uncovered
        if (second is None) != (factors.clean is None):
            raise Uncovered
        if generator is not None and torch.rand((), generator=generator, device="cpu").item() != following:
            raise Uncovered
        steps.append(step._replace(result=steps[0].result) if steps else step)
        read = [j for j in rings[i].tolist() if j >= 0]
        if all([j in stored for j in read]):
            past = [history[f"h{1 + k}"][i] * stored[j] for k, j in enumerate(read)]
            found.append(prev)
            weights.append(factors.x[i] * of_x + factors.m[i] * of_m + factors.s[i] * basis[-1] + sum(past))
        if history:
            stored[i] = history["k1"][i] * of_x + history["k2"][i] * of_m
        if second is not None and factors.clean is not None:
            found.append(second)
            weights.append(factors.clean[i, 0] * of_x + factors.clean[i, 1] * of_m)
        if scales is not None and i:
            found.append(scaled)
            weights.append(scales[i] * of_x)
        elif scales is None and n > 1 and scaled is not x:
            raise Uncovered
    results, sums = torch.stack(found), np.array(weights)
    errors = np.abs(results.double().numpy().reshape(-1, TRIED) - sums @ values)
    if results.dtype is not torch.float32 or not (relative(errors, np.abs(sums) @ np.abs(values)) <= ROUNDED).all():
        raise Uncovered
    return steps[: min(told, n)]
