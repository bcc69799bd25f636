"""The proof of rows in closed form, and what else their steps do, by the scheduler's own steps on random numbers.

The first, the middle and the last step are tried, each with those that it reads, of the first loop of each kind, which
are those of a class, its settings and options and a number of steps, or of up to a hundred that are all alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.closed_factors import Clipped, Factors, Form, Uncovered
from ddpm_ext.integrations.row_stepper import Reads, reads_of
from ddpm_ext.integrations.shared import new
from ddpm_ext.tables.row_needs import RowNeeds
from ddpm_ext.tables.trace import TraceResult
from ddpm_ext.tables.trace_batch import ROUNDED, Array, flat, relative
from ddpm_ext.tables.trace_linear import HISTORY, Ints
from ddpm_ext.tables.trace_run import (
    GIVEN,
    Result,
    Step,
    Taken,
    counted_by,
    input_names,
    on_cpu,
    parameters_of,
    parts_of,
    step_name,
    step_of,
)
from ddpm_ext.tables.trace_watch import copied

TRIED = 8  # random numbers in a proof
KINDS = 2 * (2 + HISTORY)  # samples and outputs there, as any step's result hangs on, past a step that it does not read
DRAWS = 2  # of noise, as many as any step has
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


class Numbers(NamedTuple):
    """What a proof takes. Nobody may write to it.

    Attributes:
        tensors: a sample and an output in turn, of one number each, and the noise that a generator with the seed 0
            draws.
        values: these, (tensors, TRIED).
        following: what it draws after as much noise: none, one tensor, and so on.
    """

    tensors: tuple[Tensor, ...]
    values: Array
    following: list[float]

    @staticmethod
    @functools.cache
    def of(dims: int) -> Numbers:
        generator = torch.Generator().manual_seed(1)
        shape = TRIED, *[1] * (dims - 1)
        kinds = [torch.randn(shape, generator=generator, device="cpu") for _ in range(KINDS)]
        following = []
        for draws in range(1 + DRAWS):
            generator.manual_seed(0)
            z = [torch.randn(shape, generator=generator, device="cpu") for _ in range(draws)]
            following.append(torch.rand((), generator=generator, device="cpu").item())
        return Numbers((*kinds, *z), np.array([flat(y) for y in (*kinds, *z)]), following)

    def around(self, clipped: Clipped, tried: Sequence[int]) -> Numbers:
        """Others, by which half of the clean samples of each step of `tried` are within the clip's range, and most
        others beyond."""
        values, tensors = self.values.copy(), list(self.tensors)
        for at, i in zip(range(0, KINDS, 2), tried, strict=False):
            largest = np.abs(clipped.clean[i]) @ np.abs(values[at : at + 2])
            sizes = 2.0 ** np.floor(np.log2(clipped.clip[1] / largest))  # in float32, the products are exact
            sizes[::2] = np.maximum(8 * sizes[::2], 1)
            values[at : at + 2] *= sizes
            for k in (at, at + 1):
                tensors[k] = torch.from_numpy(values[k].astype(np.float32)).reshape(tensors[k].shape)
        return Numbers(tuple(tensors), values, self.following)


class Loop(NamedTuple):
    """What is proven, by `numbers`: of `first`, `timesteps` and `options` as `follow` has them, and what `_history`
    gives."""

    form: Form
    first: int
    timesteps: Tensor
    options: Mapping[str, Any]
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
        """The steps that prove it: its beginning, one in the middle and the last one, with those that these read."""
        n, period = len(self.timesteps), self.factors.period
        middle = min(n - 1, (n // 2 // period + 1) * period - 1)  # after which nothing is stored for the next one
        return sorted({*range(min(n, self.beginning())), *self._with_read(middle), *self._with_read(n - 1)})

    def _with_read(self, i: int) -> range:
        """Step i and those before it, from one on that reads no result of another."""
        period, own = self.factors.period, self.factors.own
        first = max(0, (i - self.rings.shape[1]) // period * period)
        while own is not None and first > 0 and own[first]:
            first -= 1
        return range(first, i + 1)

    def given(self) -> int:
        """How many tensors each step is given."""
        return sum(value is GIVEN for value in self.options.values())

    def counted(self, i: int) -> dict[str, int]:
        """What counts the steps, after step i."""
        return {} if self.form.counter is None else {self.form.counter: self.first + 1 + i}


def proven_steps(scheduler: Any, loop: Loop, n: int) -> Steps:
    """What n steps do beside their factors, once some of the loop have shown that these are theirs. Raises Uncovered
    where they are not."""
    factors, names = loop.factors, loop.form.reads
    own, more = new(type(scheduler)), [False] * (n - len(loop.timesteps))
    draws, is_one = [*factors.draws, *more], (factors.is_one or [False] * len(loop.timesteps)) + more
    adds = [bool(drawn and s) for drawn, s in zip(factors.draws, factors.s, strict=True)] + more
    reads_given = np.zeros(n, bool)
    if factors.given is not None:
        reads_given[: len(factors.given)] = factors.given != 0
    given = loop.given()
    own.__dict__.update({name: copied(vars(scheduler)[name]) for name in names})
    if factors.clipped is not None:
        loop = loop._replace(numbers=loop.numbers.around(factors.clipped, loop.tried()))
    with on_cpu():
        taken = _run(own, loop)
    _prove(loop, taken)
    steps = [taken[i].step for i in range(min(n, loop.beginning()))]
    for i in range(len(steps), n):
        like, drawn = steps[-factors.period], [torch.float32] * (given + draws[i])
        kept = like.state if factors.period > 1 else {}
        steps.append(like._replace(draws=drawn, state=kept | loop.counted(i), is_one=is_one[i]))
    pairs = [(steps[i], each.step) for i, each in taken.items()]  # the last ones beside what they are to be like
    if any((a.state.keys(), *a[3:]) != (b.state.keys(), *b[3:]) for a, b in pairs):
        raise Uncovered
    if loop.history and loop.history["k1"].any() and any([step.holds_output for step in steps]):
        raise Uncovered  # since rows then keep the output itself, and not a sum with it
    history = np.zeros((n, HISTORY), bool)
    history[: len(loop.rings), : loop.rings.shape[1]] = loop.rings >= 0
    history[:, 0] |= reads_given
    keeps = np.zeros(n + 1, bool)
    keeps[loop.rings] = True  # and behind them all, for those that read nothing
    needs = [
        RowNeeds(calls_model=True, guided=False, needs_output=True, noisy=adds[i], history=tuple(read),
                 keeps=keep, keeps_output=keep and steps[i].holds_output)
        for i, (read, keep) in enumerate(zip(history.tolist(), keeps[:-1].tolist(), strict=True))
    ]  # fmt: skip
    clip, is_clean = None if factors.clipped is None else factors.clipped.clip, factors.clean is not None
    noise = [given + drawn - 1 if added else None for added, drawn in zip(adds, draws, strict=True)]
    of_each = [[0] if each else [] for each in reads_given.tolist()]
    trace = TraceResult({}, clip, ROUNDED, steps, noise, of_each, is_clean, [0.0] * n, read=names)
    reads = reads_of(needs, clip, [step.holds_output for step in steps])
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
        given = loop.numbers.tensors[(at + 2) % KINDS]
        taken[i] = _take(own, loop, i, x, m, given, taken[0].step.result if turn else None)
    return taken


def _take(own: Any, loop: Loop, i: int, x: Tensor, m: Tensor, given: Tensor, like: Result | None) -> Taken:
    """Step i, which returns a tuple in place of `like`, if there is one. Raises Uncovered where it does anything else
    than steps of these factors do, whatever the numbers. given: a tensor that it is given, if it asks for one."""
    factors, t = loop.factors, loop.timesteps[i]
    draws, begins_period = factors.draws[i], i % factors.period == 0
    scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
    before = vars(own).copy()
    generator = torch.Generator().manual_seed(0) if draws else NONE
    called = step_name(own)
    parameters = parameters_of(getattr(type(own), called))
    options: dict[str, Any] = dict(zip(input_names(parameters), (m, t, x), strict=True))
    options |= {name: given if value is GIVEN else value[i] for name, value in loop.options.items()}
    options |= {"generator": generator} if "generator" in parameters else {}
    options |= {"return_dict": False} if like is not None and "return_dict" in parameters else {}
    result, prev, second = parts_of(getattr(own, called)(**options))
    drawn = [torch.float32] * (loop.given() + draws)
    found = step_of(own, like or result, m, before, drawn, loop.given(), {})._replace(is_one=prev is second)
    if not (
        loop.counted(i).items() <= found.state.items()
        and found.state.get("dt") == (None if factors.dt is None or not begins_period else factors.dt[i])
        and found.stores == (factors.past is not None and begins_period)
        and (second is None) == (factors.clean is None)
        and found.is_one == bool(factors.is_one and factors.is_one[i])
        and (scaled is x or factors.scales is not None or len(loop.timesteps) == 1)
        and (not draws or torch.rand((), generator=generator, device="cpu").item() == loop.numbers.following[draws])
    ):
        raise Uncovered
    return Taken(found, prev, second, scaled)


def _prove(loop: Loop, taken: Mapping[int, Taken]) -> None:
    """Raises Uncovered where the tensors that steps gave are not what the factors make of the numbers."""
    factors, history, values = loop.factors, loop.history, loop.numbers.values
    sizes, clipped = np.abs(values), factors.clipped
    if clipped is not None:
        pairs = [(clipped.clean[i], slice(2 * turn, 2 * turn + 2)) for turn, i in enumerate(taken)]
        values = np.vstack([values, [np.clip(own @ values[at], *clipped.clip) for own, at in pairs]])
        sizes = np.vstack([sizes, [np.minimum(np.abs(own) @ sizes[at], clipped.clip[1]) for own, at in pairs]])
    basis = np.eye(len(values))
    claims: list[tuple[Tensor, Array]] = []  # each tensor, and how much of each number is in it
    stored: dict[int, Array] = {}  # the same of what a step keeps, by its number
    for turn, (i, (_, prev, second, scaled)) in enumerate(taken.items()):
        at = 2 * turn % KINDS
        of_x, of_m = basis[at : at + 2]
        if factors.own is not None and factors.own[i]:
            of_x = claims[-1][1]
        clean = basis[KINDS + DRAWS + turn] if clipped is not None else None
        if clipped is None and factors.clean is not None:
            clean = factors.clean[i, 0] * of_x + factors.clean[i, 1] * of_m
        read = [j for j in loop.rings[i].tolist() if j >= 0]
        if all([j in stored for j in read]):
            past = [history[f"h{1 + k}"][i] * stored[j] for k, j in enumerate(read)]
            past += [] if clipped is None else [clipped.factor[i] * clean]
            past += [] if factors.given is None else [factors.given[i] * basis[(at + 2) % KINDS]]
            of_z = basis[KINDS + max(factors.draws[i] - 1, 0)]
            claims.append((prev, factors.x[i] * of_x + factors.m[i] * of_m + factors.s[i] * of_z + sum(past)))
        if history:
            stored[i] = history["k1"][i] * of_x + history["k2"][i] * of_m
        if second is not None and clean is not None:
            claims.append((second, clean))
        if scaled is not None and factors.scales is not None and i:
            claims.append((scaled, factors.scales[i] * of_x))
    results, sums = torch.stack([x for x, _ in claims]), np.array([weights for _, weights in claims])
    errors = np.abs(results.double().numpy().reshape(-1, TRIED) - sums @ values)
    if results.dtype is not torch.float32 or not (relative(errors, np.abs(sums) @ sizes) <= ROUNDED).all():
        raise Uncovered
