"""The rows of some schedulers of diffusers from their own levels, in closed form and without a trace.

So their first loop costs hardly more than any other: a trace takes longer than a loop of their own steps. As there, the
scheduler's own steps on random numbers prove the rows: here the first and the last one, and of those that read steps
before them some more, of the first loop of each kind, which are those of a class, its settings and a number of
steps, or of up to a hundred that are all alike. What an expression does not cover is traced, and so is a class whose
methods are not diffusers' own.
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
from ddpm_ext.integrations.diffusers.closed_factors import WIDE, Factors, Uncovered, Untraceable
from ddpm_ext.integrations.diffusers.closed_forms import FORMS, Form
from ddpm_ext.integrations.diffusers.scheduler import is_diffusers, own_methods
from ddpm_ext.integrations.row_stepper import Reads, reads_of
from ddpm_ext.integrations.shared import new
from ddpm_ext.tables.row_needs import RowNeeds
from ddpm_ext.tables.trace import NoRow, TraceResult
from ddpm_ext.tables.trace_batch import ROUNDED, Array, flat, relative
from ddpm_ext.tables.trace_linear import HISTORY, Ints, columns_of, rings_of
from ddpm_ext.tables.trace_run import Result, Step, Taken, counted_by, on_cpu, parameters_of, parts_of, step_of
from ddpm_ext.tables.trace_watch import copied

METHODS = (
    "step", "scale_model_input", "index_for_timestep", "_init_step_index",
    "get_scalings_for_boundary_condition_discrete", "convert_model_output", "_sigma_to_alpha_sigma_t",
    "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update", "step_plms", "_get_prev_sample",
    "singlestep_dpm_solver_update", "singlestep_dpm_solver_second_order_update",
    "singlestep_dpm_solver_third_order_update", "precondition_inputs", "precondition_outputs", "_get_conditioning_c_in",
)  # fmt: skip
CACHED = 64  # kinds of loops
ALIKE = 100  # steps in a loop of such a kind, or fewer
TRIED = 8  # random numbers in a proof
KINDS = 2 * (2 + HISTORY)  # samples and outputs there, as any step's result hangs on, past a step that it does not read
NONE: Any = object()  # a generator that nobody can draw by


class Steps(NamedTuple):
    """What is the same for all levels: of a class with these methods and settings, and a loop of as many steps, or
    fewer where they are alike.

    Attributes:
        trace: what `follow` finds of them, without numbers.
        needs, reads: as RowStepper takes them.
        stateless: as TracedRows has it.
        counted: the numbers that the steps read and change.
        alike: whether they are.
        dtypes: as TracedRows has them, of all such loops.
    """

    trace: TraceResult
    needs: list[RowNeeds]
    reads: list[Reads]
    stateless: bool
    counted: set[str]
    alike: bool
    dtypes: dict[Any, Any]


_steps: BoundedCache[Steps] = BoundedCache(CACHED)


def closed(scheduler: Any, first: int, timesteps: Tensor, dims: int) -> tuple[TraceResult, Steps] | None:
    """What `follow` finds. None where it is to be traced; raises NoRow where that would be in vain.

    Args:
        scheduler: an object of diffusers' class, on the CPU, as a loop begins; it stays as it is.
        first: the place of the first of `timesteps` among its own, of which they are all that follow.
        dims: how many dimensions samples have.
    """
    cls: Any = type(scheduler)
    form, methods = FORMS.get(cls.__name__), own_methods(cls, _methods_of(cls))
    is_own = methods is not None and is_diffusers(cls) and vars(scheduler).keys().isdisjoint(METHODS)
    if form is None or not is_own or torch.get_default_dtype() is not torch.float32:
        return None
    try:
        factors = form.factors(scheduler, first)
        history, rings = _history(factors)
        _check(scheduler, form, first, len(timesteps), factors, history)
        settings = tuple([getattr(scheduler.config, name, None) for name in form.settings])
        n = len(timesteps)
        rows = -(-n // ALIKE) * ALIKE if form.alike and n > 1 else n
        kind = None if form.alike else (tuple(factors.noisy), (factors.s != 0).tobytes(), rings.tobytes())
        key = cls, methods, settings, first, rows, kind, dims
        loop = Loop(form, first, timesteps, factors, history, rings, Numbers.of(dims))
        found = _steps.get_or_make(key, lambda: _tried(scheduler, loop, rows))
    except Untraceable as why:
        raise NoRow(str(why), form.reads) from None
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
    steps, own = trace.steps[:n], factors.own or trace.own[:n]
    if dt is not None:
        steps = [
            step if step.state.get("dt") is None else step._replace(state=step.state | {"dt": length})
            for step, length in zip(steps, dt.unbind(), strict=True)
        ]
    columns |= history
    noise, given = trace.noise[:n], trace.given[:n]
    whole = trace._replace(columns=columns, steps=steps, noise=noise, given=given, own=own, scales=factors.scales)
    return whole, found


@functools.lru_cache(64)
def _methods_of(cls: type) -> tuple[str, ...]:
    return tuple(name for name in METHODS if hasattr(cls, name))


def _history(factors: Factors) -> tuple[dict[str, Array], Ints]:
    """The columns by which rows keep a tensor and read those of earlier rows, and the steps that each row reads,
    (steps, tensors), -1 for none. A tensor is in proportion as in the row that reads most of it, with 1 as the larger
    factor."""
    n, past = len(factors.x), factors.past
    if past is None or not past.any():
        return {}, np.full((n, 0 if past is None else past.shape[1]), -1)
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
    # A number that is not finite makes such a sum of squares.
    if begin != first or not all([len(each) == n and math.isfinite(each.dot(each)) for each in numbers]):
        raise Uncovered


class Numbers(NamedTuple):
    """What a proof takes. Nobody may write to it.

    Attributes:
        tensors: a sample and an output in turn, of one number each, and the noise that a generator with the seed 0
            draws first.
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
        kinds = [torch.randn(shape, generator=generator, device="cpu") for _ in range(KINDS)]
        z = torch.randn(shape, generator=generator.manual_seed(0), device="cpu")
        following = torch.rand((), generator=generator, device="cpu").item()
        return Numbers((*kinds, z), np.array([flat(y) for y in (*kinds, z)]), following)


class Loop(NamedTuple):
    """What is proven, by `numbers`: of `first` and `timesteps` as `closed` has them, and what `_history` gives."""

    form: Form
    first: int
    timesteps: Tensor
    factors: Factors
    history: dict[str, Array]
    rings: Ints
    numbers: Numbers

    def beginning(self) -> int:
        """How many steps there are up to the first that reads as many others as any. From there on, a step changes its
        index alone, or what the one a period before it does."""
        full = (self.rings >= 0).all(1)
        return 1 + (int(full.argmax()) if full.any() else self.rings.shape[1])

    def tried(self) -> list[int]:
        """The steps that prove it: its beginning, and the last ones, from one on that reads no result of another."""
        n, period, own = len(self.timesteps), self.factors.period, self.factors.own
        last = (n - 1 - self.rings.shape[1]) // period * period
        while own is not None and last > 0 and own[last]:
            last -= 1
        return sorted({*range(self.beginning()), *range(last, n)}.intersection(range(n)))

    def counted(self, i: int) -> dict[str, int]:
        """What counts the steps, after step i."""
        return {} if self.form.counter is None else {self.form.counter: self.first + 1 + i}


def _tried(scheduler: Any, loop: Loop, n: int) -> Steps:
    """What n steps do beside their factors, once some of the loop have shown that these are theirs. Raises Uncovered
    where they are not."""
    factors, names = loop.factors, loop.form.reads
    own, more = new(type(scheduler)), [False] * (n - len(loop.timesteps))
    noisy, is_one = factors.noisy + more, (factors.is_one or [False] * len(loop.timesteps)) + more
    adds = [draws and bool(s) for draws, s in zip(factors.noisy, factors.s, strict=True)] + more
    own.__dict__.update({name: copied(vars(scheduler)[name]) for name in names})
    with on_cpu():
        taken = _run(own, loop)
    _prove(loop, taken)
    steps = [taken[i].step for i in range(min(n, loop.beginning()))]
    for i in range(len(steps), n):
        like, drawn = steps[-factors.period], [torch.float32] * noisy[i]
        kept = like.state if factors.period > 1 else {}
        steps.append(like._replace(draws=drawn, state=kept | loop.counted(i), is_one=is_one[i]))
    pairs = [(steps[i], each.step) for i, each in taken.items()]  # the last ones beside what they are to be like
    if any((a.state.keys(), *a[3:]) != (b.state.keys(), *b[3:]) for a, b in pairs):
        raise Uncovered
    if loop.history and loop.history["k1"].any() and any([step.holds_output for step in steps]):
        raise Uncovered  # since rows then keep the output itself, and not a sum with it
    history = np.zeros((n, HISTORY), bool)
    history[: len(loop.rings), : loop.rings.shape[1]] = loop.rings >= 0
    keeps = np.zeros(n + 1, bool)
    keeps[loop.rings] = True  # and behind them all, for those that read nothing
    needs = [
        RowNeeds(calls_model=True, guided=False, needs_output=True, noisy=adds[i], history=tuple(read),
                 keeps=keep, keeps_output=keep and steps[i].holds_output)
        for i, (read, keep) in enumerate(zip(history.tolist(), keeps[:-1].tolist(), strict=True))
    ]  # fmt: skip
    noise, is_clean = [0 if added else None for added in adds], factors.clean is not None
    trace = TraceResult({}, None, ROUNDED, steps, noise, [[]] * n, is_clean, [0.0] * n, read=names)
    reads = reads_of(needs, None, [step.holds_output for step in steps])
    return Steps(trace, needs, reads, is_stateless(needs, steps), counted_by(steps, names), loop.form.alike, {})


def is_stateless(needs: Sequence[RowNeeds], steps: Sequence[Step]) -> bool:
    """As TracedRows has it."""
    return not (any([each.keeps for each in needs]) or any([step.stores for step in steps]))


def _run(own: Any, loop: Loop) -> dict[int, Taken]:
    """What the tried steps do, in their order, by an object whose steps are run."""
    taken: dict[int, Taken] = {}
    for turn, i in enumerate(loop.tried()):
        at = 2 * turn % KINDS
        x, m = loop.numbers.tensors[at : at + 2]
        if turn:
            vars(own).update(loop.counted(i - 1))
        if loop.factors.own is not None and loop.factors.own[i]:
            x = taken[i - 1].prev  # in whose place the step reads what it was made of
        taken[i] = _take(own, loop, i, x, m, taken[0].step.result if turn else None)
    return taken


def _take(own: Any, loop: Loop, i: int, x: Tensor, m: Tensor, like: Result | None) -> Taken:
    """Step i, which returns a tuple in place of `like`, if that is given. Raises Uncovered where it does anything else
    than steps of these factors do, whatever the numbers."""
    factors, t = loop.factors, loop.timesteps[i]
    noisy, begins_period = factors.noisy[i], i % factors.period == 0
    scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
    before = vars(own).copy()
    generator = torch.Generator().manual_seed(0) if noisy else NONE
    options = {"generator": generator} if "generator" in parameters_of(type(own).step) else {}
    result, prev, second = parts_of(own.step(m, t, x, **options | ({} if like is None else {"return_dict": False})))
    step = step_of(own, like or result, m, before, [torch.float32] * noisy, 0, {})._replace(is_one=prev is second)
    if not (
        loop.counted(i).items() <= step.state.items()
        and step.state.get("dt") == (None if factors.dt is None or not begins_period else factors.dt[i])
        and step.stores == (factors.past is not None and begins_period)
        and (second is None) == (factors.clean is None)
        and step.is_one == bool(factors.is_one and factors.is_one[i])
        and (scaled is x or factors.scales is not None or len(loop.timesteps) == 1)
        and (not noisy or torch.rand((), generator=generator, device="cpu").item() == loop.numbers.following)
    ):
        raise Uncovered
    return Taken(step, prev, second, scaled)


def _prove(loop: Loop, taken: Mapping[int, Taken]) -> None:
    """Raises Uncovered where the tensors that steps gave are not what the factors make of the numbers."""
    factors, history, values = loop.factors, loop.history, loop.numbers.values
    basis = np.eye(len(values))
    claims: list[tuple[Tensor, Array]] = []  # each tensor, and how much of each number is in it
    stored: dict[int, Array] = {}  # the same of what a step keeps, by its number
    for turn, (i, (_, prev, second, scaled)) in enumerate(taken.items()):
        at = 2 * turn % KINDS
        of_x, of_m = basis[at : at + 2]
        if factors.own is not None and factors.own[i]:
            of_x = claims[-1][1]
        read = [j for j in loop.rings[i].tolist() if j >= 0]
        if all([j in stored for j in read]):
            past = [history[f"h{1 + k}"][i] * stored[j] for k, j in enumerate(read)]
            claims.append((prev, factors.x[i] * of_x + factors.m[i] * of_m + factors.s[i] * basis[-1] + sum(past)))
        if history:
            stored[i] = history["k1"][i] * of_x + history["k2"][i] * of_m
        if second is not None and factors.clean is not None:
            claims.append((second, factors.clean[i, 0] * of_x + factors.clean[i, 1] * of_m))
        if scaled is not None and factors.scales is not None and i:
            claims.append((scaled, factors.scales[i] * of_x))
    results, sums = torch.stack([x for x, _ in claims]), np.array([weights for _, weights in claims])
    errors = np.abs(results.double().numpy().reshape(-1, TRIED) - sums @ values)
    if results.dtype is not torch.float32 or not (relative(errors, np.abs(sums) @ np.abs(values)) <= ROUNDED).all():
        raise Uncovered
