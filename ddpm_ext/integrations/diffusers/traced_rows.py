"""The rows of a traced scheduler's loop, from the state in which it begins, and where they are kept for other loops."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.scheduler import clip_of, tensor_contents
from ddpm_ext.integrations.diffusers.step_call import Options, options_of_steps
from ddpm_ext.integrations.fallback import Fallback, made_outside_autograd, result_of
from ddpm_ext.integrations.proof import Proof
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.shared import CACHED, new
from ddpm_ext.tables.step_table import packed_rows, table_of_checked
from ddpm_ext.tables.step_table_columns import default_draws, numbers
from ddpm_ext.tables.trace import TraceResult, follow
from ddpm_ext.tables.trace_run import CONFIG, CONSTANT, observe, setting

SETTINGS = 16  # how many settings of one kind of loop have their rows in a cache
OURS = {*CACHED, "_acceleration", "_position", "_scales_inputs"}  # attributes that no library has
FEW = 3  # steps by which the dtypes of a loop in float32 are known
WRITTEN = ("_class_name", "_diffusers_version")
HASHED = (bool, int, str, type(None), torch.dtype, torch.device)
Config = tuple[dict[str, Any], dict[str, Any]]  # the attributes and the items of one, which may differ


class ABSENT:
    """In place of an attribute that is not there: a class, since pickles keep its identity."""


class LoopKey(NamedTuple):
    """Which steps a loop has, and what they are called with.

    Attributes:
        options: what step is called with beside the model's output, the timestep and the sample.
        first: the first one's index among the scheduler's timesteps.
        kind: the dtype of the timesteps where they are tensors, else the class of their numbers.
        has_dim: whether they have a dimension, (1,) or (batch,).
        dims: how many dimensions samples have.
    """

    options: Options
    first: int
    kind: torch.dtype | type
    has_dim: bool
    dims: int

    def times(self, timesteps: Tensor) -> list[Any]:
        """These, as the loop's steps are called with them."""
        if not isinstance(self.kind, torch.dtype):
            return [self.kind(t) for t in timesteps.tolist()]
        return list((timesteps[:, None] if self.has_dim else timesteps).to(self.kind))


class LoopDtypes(NamedTuple):
    """The dtypes of a loop: what the operator computes in, those of a step's results (`second` is None where it has one
    alone), and those of each step's draws."""

    computed: torch.dtype
    prev: torch.dtype
    second: torch.dtype | None
    draws: list[list[torch.dtype]]


class LoopRows(NamedTuple):
    """The rows of a loop.

    Attributes:
        key: of which loop.
        times: what the step of each row is called with.
        trace, stepper: what tracing told of the loop; takes the rows.
        has_history: whether a step reads what those before it left, so that diffusers' own code can't take one of them.
        states: before each row, the numbers of the scheduler that steps read and change, such as its _step_index.
        contents: of its other attributes, and of its class's, that they read.
        scheduler: as it was when the loop began, on the CPU.
        dtypes: by the dtypes of output and sample.
        proofs: of a step that somebody wrote himself, by shape, dtypes and device.
    """

    key: LoopKey
    times: Sequence[Any]
    trace: TraceResult
    stepper: RowStepper
    has_history: bool
    states: list[dict[str, Any]]
    contents: dict[str, object]
    scheduler: Any
    dtypes: dict[tuple[torch.dtype, torch.dtype], LoopDtypes | Fallback]
    proofs: dict[object, Proof]

    def __deepcopy__(self, memo: object) -> LoopRows:
        return self

    def dtypes_of(self, output: torch.dtype, sample: torch.dtype) -> LoopDtypes:
        """Those of the loop's results and draws, told by a run of it on few numbers of these dtypes."""
        dtypes = self.dtypes.get((output, sample))
        if dtypes is None:
            dtypes = self.dtypes[output, sample] = made_outside_autograd(_make_dtypes, self, output, sample)
        return result_of(dtypes)

    def is_at(self, row: int, state: Mapping[str, Any]) -> bool:
        """Whether a scheduler's numbers are those before a row: by these, its own step would take that one. Without an
        index it would look for one by the timestep."""
        numbers, index = self.states[row], "_step_index"
        return all([state.get(n) == x or (n == index and state.get(n, 0) is None) for n, x in numbers.items()])


# ------------------------------------------------------------------------------------------------------------ cache


class CachedRows(NamedTuple):
    """The rows of a scheduler with this config, whose attributes have these contents; or why there are none."""

    config: Config
    contents: dict[str, object]
    rows: LoopRows | Fallback


def rows_of_loop(cls: Any, state: Mapping[str, Any], key: LoopKey, cache: BoundedCache[Any]) -> CachedRows:
    """The rows of a loop, from the cache where an object had the same state; what was refused once is not tried again.

    state: the attributes of an accelerated object of the class.
    """
    cached: list[CachedRows] = cache.get_or_make((cls, torch.get_default_dtype(), key), list)
    config, content = config_of(state), functools.cache(functools.partial(content_of, cls, state))  # once from a GPU
    for entry in cached:
        if is_config(config, entry.config) and all(content(name) == x for name, x in entry.contents.items()):
            return entry
    read: set[str] = set()
    made = made_outside_autograd(trace_rows, cls, state, key, read)
    entry = CachedRows(config, {name: content(name) for name in _relevant(cls, state, read)}, made)
    # Rows are looked at first: what is refused in any state may have been traced in one that a loop begins in.
    latest = cached[: SETTINGS - 1]
    cached[:] = [entry, *latest] if isinstance(made, LoopRows) else [*latest, entry]
    return entry


def config_of(state: Mapping[str, Any]) -> Config:
    return dict(vars(state[CONFIG])), dict(state[CONFIG])


def is_config(one: Config, other: Config) -> bool:
    try:
        return one == other or _without_written(one) == _without_written(other)
    except ValueError:  # of arrays, which do not tell in one word whether they are equal
        return False


def _without_written(config: Config) -> list[dict[str, Any]]:
    """The config without what diffusers writes into it when it is printed or saved."""
    return [{name: x for name, x in part.items() if name not in WRITTEN} for part in config]


def _relevant(cls: Any, state: Mapping[str, Any], read: set[str]) -> set[str]:
    """Of the names that a scheduler read, those of attributes, of methods, and of what neither it nor its class has. A
    property reads other attributes, which are noted themselves."""
    names = {*read, "timesteps"} - {CONFIG} - {name for name in read if name.startswith("__")}
    return {name for name in names if name in state or not hasattr(getattr(cls, name, ABSENT), "__set__")}


def content_of(cls: Any, state: Mapping[str, Any], name: str) -> object:
    """A key of an attribute, of the class where the object has none. Raises Fallback where it cannot be compared."""
    return _content(state[name] if name in state else getattr(cls, name, ABSENT))


def _content(value: Any) -> object:
    if isinstance(value, Tensor):
        return tensor_contents(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype, value.shape, value.tobytes()
    if type(value) is float:
        return value.hex()  # by which NaN is the same, and -0 another
    if isinstance(value, list | tuple):
        return type(value), *map(_content, value)
    if isinstance(value, dict):
        return tuple((key, _content(x)) for key, x in value.items())
    if value is ABSENT or isinstance(value, FunctionType | MethodType):
        return value
    if isinstance(value, HASHED):
        return type(value), value
    raise Fallback(f"its state cannot be compared: it holds a {type(value).__name__}")


# ------------------------------------------------------------------------------------------------------------ rows


def _recording_reads(scheduler: Any, read: set[str]) -> Any:
    """The scheduler, which adds the names of its attributes that are read before they are written to `read`. So do its
    copies."""
    cls, written = type(scheduler), set()

    class Recording(cls):  # type: ignore[misc,valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name not in written:
                read.add(name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            written.add(name)
            super().__setattr__(name, value)

    Recording.__name__, Recording.__qualname__ = cls.__name__, cls.__qualname__
    scheduler.__class__ = Recording
    return scheduler


def trace_rows(cls: Any, state: Mapping[str, Any], key: LoopKey, read: set[str]) -> LoopRows:
    """The rows from a step on. read: gets the names of what the scheduler reads. Raises Fallback where it has none."""
    scheduler, recording, first = new(cls), _recording_reads(new(cls), read), key.first
    attributes = {n: x.detach().cpu() if isinstance(x, Tensor) else x for n, x in state.items() if n not in OURS}
    vars(scheduler).update(attributes), vars(recording).update(attributes)
    times = key.times(scheduler.timesteps[first:])
    try:
        options = options_of_steps(key.options, scheduler.timesteps, first, len(times))
        trace = follow(recording, times, options, dims=key.dims)
        n, columns = len(trace.steps), trace.columns
        # Whatever part of a loop the rows are of, their noise is that of the whole loop's.
        every = numbers("timestep", scheduler.timesteps)
        columns = columns | {
            "draw": default_draws(every)[first:][:n],
            "cu": np.array(trace.of_last),
            "c1": columns["c1"] - trace.of_last,
        }
        packed = packed_rows(columns)
    except Exception as error:  # what a scheduler's own code raises, it will raise again
        raise Fallback(f"it cannot be traced: {error}") from error
    if trace.steps[0].result.name is not None and not trace.second:
        raise Fallback("its step returns a second tensor, which is not of sample and output alone")
    threshold = clip_of(scheduler.config)[1] if trace.clip is not None and setting(scheduler, "thresholding") else None
    table = functools.partial(table_of_checked, columns)
    stepper = RowStepper(table, trace.clip, threshold, holds_outputs=False, packed=packed)
    if trace.scales is not None and not any(trace.of_last) and not any(step.scale_counts for step in trace.steps[1:]):
        stepper = stepper.for_inputs(torch.from_numpy(np.append(trace.scales[1:], 1.0)).float())
    else:
        trace = trace._replace(scales=None)
    keeps = any(needs.keeps for needs in stepper.needs) or any(step.stores for step in trace.steps)
    has_history = keeps or any(trace.of_last)
    counted, relevant = {name for step in trace.steps for name in step.state}, _relevant(cls, attributes, read)
    states = [{name: attributes.get(name) for name in counted & relevant}]
    for step in trace.steps[:-1]:
        states.append({name: step.state.get(name, value) for name, value in states[-1].items()})
    tensors = {name for each in states for name, value in each.items() if type(value) not in CONSTANT}
    states = [{name: value for name, value in each.items() if name not in tensors} for each in states]
    contents = {name: content_of(cls, attributes, name) for name in relevant - counted - {"_begin_index"}}
    return LoopRows(key, times[:n], trace, stepper, has_history, states, contents, scheduler, {}, {})


def _make_dtypes(rows: LoopRows, output: torch.dtype, sample: torch.dtype) -> LoopDtypes:
    """LoopDtypes, of a run of the scheduler's own steps on two small samples."""
    key, steps = rows.key, rows.trace.steps
    # In float32, or what a timestep with a dimension makes of it, all steps are as the first ones.
    n = len(steps)
    few = min(n, FEW) if {output, sample} == {torch.float32} else n
    x, m = (torch.full((2, *[1] * (key.dims - 1)), 0.5, dtype=dtype, device="cpu") for dtype in (sample, output))
    try:
        samples, outputs = ([each.clone() for _ in range(few)] for each in (x, m))
        options = options_of_steps(key.options, rows.scheduler.timesteps, key.first, n)
        taken = observe(rows.scheduler, rows.times, samples, outputs, lambda *_: x.double(), options, wide=False)
    except Exception as error:
        raise Fallback(f"it cannot be run in {output} and {sample}: {error}") from error
    prev, second = taken[0].prev.dtype, None if taken[0].second is None else taken[0].second.dtype
    if any(each.prev.dtype != prev for each in taken) or prev not in (torch.float32, output, sample):
        raise Fallback(f"its results are {', '.join({str(each.prev.dtype) for each in taken})}")
    draws = [each.draws for each in taken] + [[torch.float32] * len(step.draws) for step in steps[few:]]
    computed = torch.promote_types(torch.promote_types(output, sample), prev)
    return LoopDtypes(torch.promote_types(computed, second or computed), prev, second, draws)
