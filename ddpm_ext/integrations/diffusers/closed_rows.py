"""The rows of five schedulers of diffusers from their own levels, in closed form and without a trace.

So their first loop costs hardly more than any other: a trace takes longer than a loop of their own steps. As there, the
scheduler's own steps on random numbers prove the rows: here the first and the last one, and of those that read the step
before the second as well, of the first loop of each kind, which are those of a class, its settings and a number of
steps. What an expression does not cover is traced, and so is a class whose methods are not diffusers' own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.closed_forms import FORMS, WIDE, Factors, Uncovered
from ddpm_ext.integrations.diffusers.scheduler import is_diffusers, own_methods
from ddpm_ext.integrations.shared import new
from ddpm_ext.tables.row_needs import RowNeeds
from ddpm_ext.tables.trace import TraceResult
from ddpm_ext.tables.trace_batch import ROUNDED, Array, flat, relative
from ddpm_ext.tables.trace_linear import columns_of
from ddpm_ext.tables.trace_run import Step, on_cpu, parts_of, step_of
from ddpm_ext.tables.trace_watch import copied

METHODS = (
    "step", "scale_model_input", "index_for_timestep", "_init_step_index",
    "get_scalings_for_boundary_condition_discrete", "convert_model_output", "_sigma_to_alpha_sigma_t",
    "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update",
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
        history = _history(factors)
        _check(scheduler, first, len(timesteps), factors, history)
        settings = tuple([getattr(scheduler.config, name) for name in form.settings])
        key = cls, methods, settings, first, tuple(factors.noisy), (factors.s != 0).tobytes(), dims
        found = _steps.get_or_make(key, lambda: _tried(scheduler, form.reads, first, timesteps, factors, dims))
    except Exception:  # which a trace explains
        return None
    clean = factors.clean
    columns = {"c1": factors.x, "c2": factors.m} if clean is None else columns_of(factors.x, factors.m, clean)
    times = scheduler.timesteps.numpy()[first:]
    columns |= {"s": factors.s, "timestep": times.astype(WIDE if times.dtype.kind == "f" else np.int64)}
    return found.trace._replace(columns=columns | history, scales=factors.scales), found


def _history(factors: Factors) -> dict[str, Array]:
    """The columns by which rows keep a tensor and read that of the row before. It is in proportion as in the next
    row, with 1 as the larger factor."""
    past, reads = factors.past, factors.reads
    if past is None or not any(reads):
        return {}
    sizes = np.abs([factors.x, factors.m, *past.T]).max(0)
    kept = np.zeros_like(past)
    kept[:-1] = (past / sizes[:, None])[1:]
    keeps = np.flatnonzero(reads) - 1
    kept[keeps] /= kept[keeps, np.abs(kept[keeps]).argmax(1)][:, None]
    read = np.zeros(len(past))
    read[keeps + 1] = (past[keeps + 1] * kept[keeps]).sum(1) / (kept[keeps] * kept[keeps]).sum(1)
    return {"h1": read, "k1": kept[:, 0], "k2": kept[:, 1]}


def _check(scheduler: Any, first: int, n: int, factors: Factors, history: Mapping[str, Array]) -> None:
    """Raises Uncovered for a loop that begins elsewhere, and for numbers that are no steps'."""
    begin = scheduler._begin_index if scheduler._step_index is None else scheduler._step_index  # noqa: SLF001
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
        tensors: samples of one number each, outputs, and the noise that a generator with the seed 0 draws first.
        values: these, (3, TRIED).
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
        x, m = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
        z = torch.randn(shape, generator=generator.manual_seed(0), device="cpu")
        following = torch.rand((), generator=generator, device="cpu").item()
        return Numbers((x, m, z), np.array([flat(y) for y in (x, m, z)]), following)


def _tried(scheduler: Any, names: frozenset[str], first: int, timesteps: Tensor, factors: Factors, dims: int) -> Steps:
    """What the steps do beside their factors, once some have shown that these are theirs. Raises Uncovered where they
    are not.

    names: the attributes that own steps may read.
    """
    own, n, noisy = new(type(scheduler)), len(timesteps), factors.noisy
    adds = [draws and bool(s) for draws, s in zip(noisy, factors.s, strict=True)]
    own.__dict__.update({name: copied(vars(scheduler)[name]) for name in names})
    with on_cpu():
        steps = _run(own, first, timesteps, factors, dims)
    for i in range(len(steps), n):
        drawn = [torch.float32] * noisy[i]
        steps.append(steps[-1]._replace(draws=drawn, state={"_step_index": first + 1 + i}))
    reads = [*factors.reads] or [False] * n
    holds = steps[0].holds_output
    needs = [
        RowNeeds(calls_model=True, guided=False, needs_output=True, noisy=adds[i], history=(reads[i], False, False),
                 keeps=keeps, keeps_output=keeps and holds)
        for i, keeps in enumerate([*reads[1:], False])
    ]  # fmt: skip
    noise, is_clean = [0 if added else None for added in adds], factors.clean is not None
    trace = TraceResult({}, None, ROUNDED, steps, noise, [[]] * n, is_clean, [0.0] * n, read=names)
    return Steps(trace, {}, needs)


def _run(own: Any, first: int, timesteps: Tensor, factors: Factors, dims: int) -> list[Step]:
    """What the first step does, and the second one where a step may read the one before it. From there on, a step
    changes its index alone. Raises Uncovered where a step is not that of its factors, or does more.

    own: an object whose steps are run.
    """
    n, scales, past = len(timesteps), factors.scales, factors.past
    # A step that reads the one before is tried after that one, and with other numbers.
    tried = (0, n - 1) if past is None else sorted({0, 1, n - 2, n - 1}.intersection(range(n)))
    told = 1 if past is None else 2
    tensors, values, following = Numbers.of(dims)
    scale = getattr(own, "scale_model_input", None)
    steps: list[Step] = []
    found: list[Tensor] = []
    weights: list[Sequence[float]] = []
    for turn, i in enumerate(tried):
        if turn:
            own._step_index = first + i
        at_x, at_m = (0, 1) if past is None else (turn % 3, (turn + 1) % 3)
        x, m = tensors[at_x], tensors[at_m]
        scaled = x if scale is None else scale(x, timesteps[i])
        before, noisy = vars(own).copy(), factors.noisy[i]
        generator = torch.Generator().manual_seed(0) if noisy else None
        options = {"return_dict": False} if turn else {}
        result, prev, second = parts_of(own.step(m, timesteps[i], x, generator=generator or NONE, **options))
        step = step_of(own, result, m, before, [torch.float32] * noisy, 0, {})
        if step.state.get("_step_index") != first + i + 1 or step.stores != (past is not None) or step.tensors:
            raise Uncovered
        if (turn >= told and len(step.state) > 1) or (second is None) != (factors.clean is None):
            raise Uncovered
        if generator is not None and torch.rand((), generator=generator, device="cpu").item() != following:
            raise Uncovered
        steps.append(step._replace(result=steps[0].result) if steps else step)
        if past is None or not i or tried[turn - 1] == i - 1:
            weight = [0.0, 0.0, factors.s[i]]
            weight[at_x] += factors.x[i]
            weight[at_m] += factors.m[i]
            if past is not None:
                weight[at_x - 1] += past[i, 0]
                weight[at_x] += past[i, 1]
            found.append(prev)
            weights.append(weight)
        if second is not None and factors.clean is not None:
            found.append(second)
            weights.append((*factors.clean[i], 0.0))
        if scales is not None and i:
            found.append(scaled)
            weights.append((scales[i], 0.0, 0.0))
        elif scales is None and n > 1 and scaled is not x:
            raise Uncovered
    results, sums = torch.stack(found), np.array(weights)
    errors = np.abs(results.double().numpy().reshape(-1, TRIED) - sums @ values)
    if results.dtype is not torch.float32 or not (relative(errors, np.abs(sums) @ np.abs(values)) <= ROUNDED).all():
        raise Uncovered
    return steps[: min(told, n)]
