"""The rows of a traced scheduler's loop, from the state in which it begins."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.scheduler import clip_of, tensor_contents
from ddpm_ext.integrations.fallback import Fallback, made_outside_autograd, result_of
from ddpm_ext.integrations.rows import Rows
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.trace import TraceResult, follow
from ddpm_ext.tables.trace_run import Step, observe, setting, step_name


class Start(NamedTuple):
    """Which steps a plan is for.

    Attributes:
        options: what step is called with, beside the model's output, the timestep and the sample: numbers, strings and
            GIVEN, by their names in order.
        first: the first one's place among the scheduler's timesteps; None where its timestep is none of them.
        timestep: the first one's.
        kind: the dtype of the timesteps where they are tensors, else the class of their numbers.
        has_dim: whether they have a dimension, (1,) or (batch,).
        alone: whether it is the only step.
        dims: how many dimensions samples have.
    """

    options: tuple[tuple[str, Any], ...]
    first: int | None
    timestep: float
    kind: torch.dtype | type
    has_dim: bool
    alone: bool
    dims: int


class Kinds(NamedTuple):
    """The dtypes of a loop, and which rows draw nothing.

    Attributes:
        computed: that of the operator's sample.
        prev, second: those of a step's results; `second` is None where it has one alone.
        draws: those of each step's draws.
        quiet: whether a row draws nothing.
    """

    computed: torch.dtype
    prev: torch.dtype
    second: torch.dtype | None
    draws: list[list[torch.dtype]]
    quiet: list[bool]


class Plan(NamedTuple):
    """The rows of a loop.

    Attributes:
        start: which they are.
        trace: what tracing found.
        rows: in order.
        timesteps: of each row.
        stateless: whether the scheduler may go on with its own code in the middle of the loop.
        scheduler: as it was when the loop began, on the CPU.
        kinds: by the dtypes of output and sample.
        after: the plans of single steps that came after a row, by that row and their start.
    """

    start: Start
    trace: TraceResult
    rows: Rows
    timesteps: list[Any]
    stateless: bool
    scheduler: Any
    kinds: dict[tuple[torch.dtype, torch.dtype], Kinds | Fallback]
    after: dict[tuple[int, Start], Plan]

    def __deepcopy__(self, memo: object) -> Plan:
        return self

    @property
    def first(self) -> int:
        """The place of the first row among the scheduler's timesteps; 0 where it is none of them."""
        return self.start.first or 0


class _Pickler(pickle.Pickler):
    """Tensors by their values, and functions by their identity: where a scheduler holds a lambda, so does its plan."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return tuple, (tensor_contents(obj),)
        return (int, (id(obj),)) if isinstance(obj, types.FunctionType) else NotImplemented


def state_contents(state: Mapping[str, Any]) -> bytes:
    """A key of a scheduler's state. Raises Fallback where it cannot be compared."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump(state)
    except Exception as error:
        raise Fallback(f"its state cannot be compared: {error}") from None
    return file.getvalue()


def make_plan(scheduler: Any, state: Mapping[str, Any], start: Start) -> Plan:
    """The rows from a step on. Raises Fallback where they are none.

    scheduler: an object of diffusers' class without its state.
    """
    for name, value in state.items():
        scheduler.__dict__[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    own, first = scheduler.timesteps, start.first
    if first is None:
        times = torch.as_tensor(start.timestep, device="cpu")[None]
    else:
        times = own[first : first + 1 if start.alone else None]
    if isinstance(start.kind, torch.dtype):
        timesteps = list((times[:, None] if start.has_dim else times).to(start.kind))
    else:
        timesteps = [start.kind(t) for t in times.tolist()]
    try:
        trace = follow(scheduler, timesteps, dict(start.options), dims=start.dims)
        timesteps = timesteps[: len(trace.steps)]
        draws = None
        if first is not None:  # whatever part of a loop the rows are of, their noise is that of the whole loop's
            draws = StepTable(own, *[torch.zeros(len(own), device="cpu")] * 4).draw[first:][: len(timesteps)]
        table = StepTable(**trace.columns, draw=draws)
    except Exception as error:  # what a scheduler's own code raises, it will raise again
        raise Fallback(f"it cannot be traced: {error}") from error
    if trace.steps[0].result.second is not None and not trace.second:
        raise Fallback("its step returns a second tensor, which is not of sample and output alone")
    threshold = None
    if trace.clip is not None and setting(scheduler, "thresholding"):
        threshold = clip_of(scheduler.config)[1]
    rows = Rows(table, trace.clip, threshold, held=[_holds_output(step) for step in trace.steps])
    stateless = not any(kind.keeps for kind in rows.needs) and not any(step.stores for step in trace.steps)
    return Plan(start, trace, rows, timesteps, stateless, scheduler, {}, {})


def _holds_output(step: Step) -> bool:
    """Whether a scheduler holds the very tensor that is the model's output."""
    lists = (held if isinstance(held, list) else [held] for held in step.tensors.values())
    return any(value is step.output for values in lists for value in values)


def kinds_of(plan: Plan, output: torch.dtype, sample: torch.dtype) -> Kinds:
    """The dtypes of the loop's results and draws, found by running it on few numbers of these dtypes."""
    found = plan.kinds.get((output, sample))
    if found is None:
        found = plan.kinds[output, sample] = made_outside_autograd(_make_kinds, plan, output, sample)
    return result_of(found)


def _make_kinds(plan: Plan, output: torch.dtype, sample: torch.dtype) -> Kinds:
    probe = plan.trace.steps[0].sample
    assert probe is not None
    x, m = (torch.full_like(probe[:2], 0.5, dtype=dtype) for dtype in (sample, output))
    step = getattr(plan.scheduler, step_name(plan.scheduler))
    tuples = "return_dict" in inspect.signature(step).parameters
    options = dict(plan.start.options) | ({"return_dict": False} if tuples else {})
    try:
        steps = observe(
            plan.scheduler, plan.timesteps, lambda *_: x.clone(), lambda _: m.clone(), lambda: x.double(), options,
            wide=False,
        )  # fmt: skip
    except Exception as error:
        raise Fallback(f"it cannot be run in {output} and {sample}: {error}") from error
    results = [step.result for step in steps]
    prev, second = results[0].prev.dtype, None if results[0].second is None else results[0].second.dtype
    if any(result.prev.dtype != prev for result in results) or prev not in (torch.float32, output, sample):
        raise Fallback(f"its results are {', '.join({str(result.prev.dtype) for result in results})}")
    draws = [[dtype for _, dtype in step.draws] for step in steps]
    quiet = [used is None and not drawn for used, drawn in zip(plan.trace.noise, draws, strict=True)]
    computed = torch.promote_types(torch.promote_types(output, sample), prev)
    return Kinds(torch.promote_types(computed, second or computed), prev, second, draws, quiet)
