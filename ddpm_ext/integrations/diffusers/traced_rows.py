"""The rows of a traced scheduler's loop, from the state in which it begins."""

from __future__ import annotations

import functools
import io
import operator
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.scheduler import clip_of, tensor_contents
from ddpm_ext.integrations.diffusers.step_options import Options, of_steps
from ddpm_ext.integrations.fallback import Fallback, made_outside_autograd, result_of
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.shared import CACHED, new
from ddpm_ext.ops.extension import C
from ddpm_ext.tables.step_table import packed_rows, table_of_checked
from ddpm_ext.tables.step_table_columns import default_draws, numbers
from ddpm_ext.tables.trace import TraceResult, follow
from ddpm_ext.tables.trace_run import Step, counted_by, observe, parameters_of, setting, step_name
from ddpm_ext.tables.trace_watch import CONFIG, CONSTANT, MISSING, Watch, can_watch, copied

EDITED = ("sigmas", "alphas_cumprod", "timesteps")  # levels and timesteps, which somebody may edit
# The attributes that tell apart what was refused. What else steps read, such as a tensor that the loop before left, may
# be another one in each loop.
REFUSED_BY = ("sigmas", "timesteps", "_step_index")
SETTINGS = 16  # of a class whose rows are kept
OURS = {*CACHED, "_acceleration", "_traced_loop", "_scales_inputs"}  # attributes that no library has
FEW = 3  # steps by which the dtypes of a loop in float32 are known


class RowsKey(NamedTuple):
    """Which steps the rows are for.

    Attributes:
        options: what step is called with beside the model's output, the timestep and the sample.
        first: the first one's place among the scheduler's timesteps; None where its timestep is none of them.
        timestep: the first one's.
        kind: the dtype of the timesteps where they are tensors, else the class of their numbers.
        has_dim: whether they have a dimension, (1,) or (batch,).
        alone: whether it is the only step.
        dims: how many dimensions samples have.
    """

    options: Options
    first: int | None
    timestep: float
    kind: torch.dtype | type
    has_dim: bool
    alone: bool
    dims: int

    def options_of(self, own: Tensor, count: int) -> Mapping[str, Any]:
        """Those of `count` steps, as `follow` takes them. own: the scheduler's timesteps."""
        return of_steps(self.options, own, self.first or 0, count)


class LoopDtypes(NamedTuple):
    """The dtypes of a loop, and what its rows need beside a launch.

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


class TracedRows(NamedTuple):
    """The rows of a loop.

    Attributes:
        key: which they are.
        trace: what tracing found.
        stepper: takes them, in order.
        timesteps: of each row.
        stateless: whether diffusers' own code, or other rows, may take a step in the middle of the loop: the scheduler
            holds nothing but numbers of the steps before.
        scheduler: as it was when the loop began, on the CPU.
        dtypes: by the dtypes of output and sample.
        indexes: the scheduler's `_step_index` before each row; None where it has none.
        counters: its other numbers that steps read and change: the name of each, and its value before each row.
    """

    key: RowsKey
    trace: TraceResult
    stepper: RowStepper
    timesteps: Sequence[Any] | Tensor
    stateless: bool
    scheduler: Any
    dtypes: dict[tuple[torch.dtype, torch.dtype], LoopDtypes | Fallback]
    indexes: list[int | None]
    counters: list[tuple[str, list[Any]]]

    def __deepcopy__(self, memo: object) -> TracedRows:
        return self

    @property
    def first(self) -> int:
        """The place of the first row among the scheduler's timesteps; 0 where it is none of them."""
        return self.key.first or 0

    def dtypes_of(self, output: torch.dtype, sample: torch.dtype) -> LoopDtypes:
        """Those of the loop's results and draws, found by running it on few numbers of these dtypes."""
        found = self.dtypes.get((output, sample))
        if found is None:
            found = self.dtypes[output, sample] = made_outside_autograd(_make_dtypes, self, output, sample)
        return result_of(found)


class _Pickler(pickle.Pickler):
    """Tensors by their values, and functions by their identity: where a scheduler holds a lambda, so do its rows."""

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


class Known(NamedTuple):
    """What is known of loops of one setting.

    Attributes:
        attributes, items: the config's.
        contents: of the other attributes on which that hangs, by name.
        found: the rows, or why there are none.
    """

    attributes: dict[str, Any]
    items: dict[str, Any]
    contents: dict[str, object]
    found: TracedRows | Fallback


class RowsCache:
    """The rows of loops, by class, settings, timesteps and options: loops of other objects find them, too. A setting
    that was refused once is not tried again.

    size: of how many kinds of loops it keeps the latest settings.
    """

    def __init__(self, size: int) -> None:
        self._known: BoundedCache[list[Known]] = BoundedCache(size)

    def get_or_trace(self, cls: type, state: Mapping[str, Any], key: RowsKey) -> TracedRows:
        """The rows of a loop. Raises Fallback where there are none, or the state cannot be compared.

        state: the attributes of an accelerated object of diffusers' class.
        """
        read: dict[str, object] = {}  # once from a GPU

        def contents(name: str) -> object:
            if name not in read:
                read[name] = contents_of(state.get(name, MISSING))
            return read[name]

        own = tuple([(name, state[name]) for name in sorted(replaced(cls, state))])
        known = self._known.get_or_make((cls, outside(cls), own, key), list)
        for each in list(known):
            if _has_config(state, each) and all([contents(name) == value for name, value in each.contents.items()]):
                return result_of(each.found)
        state = {name: value for name, value in state.items() if name not in OURS}
        made = made_outside_autograd(trace_rows, new(cls), state, key)
        names = {*REFUSED_BY} if isinstance(made, Fallback) else {"timesteps", *(made.trace.read or state)} - {CONFIG}
        config = state[CONFIG]
        each = Known(dict(vars(config)), dict(config), {name: contents(name) for name in names}, made)
        # Rows are looked at first: what is refused in any state may have been traced in one that a loop begins in.
        latest = known[: SETTINGS - 1]
        known[:] = [each, *latest] if isinstance(made, TracedRows) else [*latest, each]
        return result_of(made)


def _has_config(state: Mapping[str, Any], known: Known) -> bool:
    try:
        return bool(C.unchanged(state, (), known.attributes, known.items))
    except ValueError:  # of arrays, which do not tell in one word whether they are equal
        return False


def outside(cls: type) -> tuple[Any, ...]:
    """What the rows of an object of diffusers' class hang on beside its attributes, such as replaced methods."""
    return _methods(cls)[1](cls), torch.get_default_dtype()


def replaced(cls: type, state: Mapping[str, Any]) -> set[str]:
    """The methods of diffusers' class that an object with this state has in its own place."""
    return state.keys() & _methods(cls)[0]


@functools.lru_cache(maxsize=64)
def _methods(cls: type) -> tuple[set[str], Callable[[type], tuple[Any, ...]]]:
    """The names of a class's methods, and a function that finds these."""
    names = {name for base in cls.__mro__ for name, x in vars(base).items() if isinstance(x, types.FunctionType)}
    return names, operator.attrgetter(*sorted(names))


def contents_of(value: object) -> object:
    """A key of an attribute. Raises Fallback where it cannot be compared."""
    if isinstance(value, Tensor):
        return tensor_contents(value)
    if type(value) is float:
        return float, value.hex()  # by which NaN is the same, and -0 another
    if value is MISSING or type(value) in CONSTANT:  # most are, and need no pickle
        return type(value), value
    if type(value) is list and CONSTANT.issuperset(map(type, value)):
        return list, *map(contents_of, value)
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.dtype, value.shape, value.tobytes()
    return state_contents({"": value})


def trace_rows(scheduler: Any, state: Mapping[str, Any], key: RowsKey) -> TracedRows:
    """The rows from a step on. Raises Fallback where they are none.

    scheduler: an object of diffusers' class without its state.
    """
    scheduler.__dict__.update({name: x if type(x) in CONSTANT else copied(x) for name, x in state.items()})
    own, first = scheduler.timesteps, key.first
    if first is None:
        times = torch.as_tensor(key.timestep, device="cpu")[None]
    else:
        times = own[first : first + 1 if key.alone else None] if first or key.alone else own
    timesteps: Any = times
    if not isinstance(key.kind, torch.dtype):
        timesteps = [key.kind(t) for t in times.tolist()]
    elif key.has_dim or key.kind is not times.dtype:
        timesteps = (times[:, None] if key.has_dim else times).to(key.kind)
    try:
        trace = follow(scheduler, list(timesteps), key.options_of(own, len(timesteps)), dims=key.dims)
        n = len(trace.steps)
        if n < len(timesteps):
            timesteps = timesteps[:n]
        draws = np.zeros(n, np.int64)
        if trace.noise.count(None) < n:
            # Whatever part of a loop the rows are of, their noise is that of the whole loop's.
            every = numbers("timestep", trace.columns["timestep"] if first is None else own)
            draws = default_draws(every)[first or 0 :][:n]
        columns = trace.columns | {"draw": draws}
        packed = packed_rows(columns)
    except Exception as error:  # what a scheduler's own code raises, it will raise again
        raise Fallback(f"it cannot be traced: {error}") from error
    if trace.steps[0].result.name is not None and not trace.second:
        raise Fallback("its step returns a second tensor, which is not of sample and output alone")
    if np.isnan(trace.own).any():
        raise Fallback("what its step makes of a sample that somebody has edited is no row")
    table = functools.partial(table_of_checked, columns)  # which few loops need; its finite numbers were proven
    dtypes: dict[tuple[torch.dtype, torch.dtype], LoopDtypes | Fallback] = {}
    threshold = None
    if trace.clip is not None and setting(scheduler, "thresholding"):
        threshold = clip_of(scheduler.config)[1]
    held = [step.holds_output for step in trace.steps]
    stepper = RowStepper(table, trace.clip, threshold, held, packed=packed)
    stateless = not (any([needs.keeps for needs in stepper.needs]) or any([step.stores for step in trace.steps]))
    counted = counted_by(trace.steps, trace.read)
    if first is None and not stateless:  # nobody knows at which timestep the next step is
        raise Fallback("its timestep is none of the scheduler's")
    indexes, counters = _values_before("_step_index", state, trace.steps), []
    for name in counted - {"_step_index"}:
        values = _values_before(name, state, trace.steps)
        if CONSTANT.issuperset(map(type, values)):
            counters.append((name, values))
    return TracedRows(key, trace, stepper, timesteps, stateless, scheduler, dtypes, indexes, counters)


def _values_before(name: str, state: Mapping[str, Any], steps: Sequence[Step]) -> list[Any]:
    """Those of an attribute before each step of a loop that begins in a state."""
    values = [state.get(name)]
    for step in steps[:-1]:
        values.append(step.state.get(name, values[-1]))
    return values


def _make_dtypes(rows: TracedRows, output: torch.dtype, sample: torch.dtype) -> LoopDtypes:
    """LoopDtypes, of a run of the scheduler's own steps on two small samples."""
    trace = rows.trace
    x, m = (torch.full((2, *[1] * (rows.key.dims - 1)), 0.5, dtype=dtype, device="cpu") for dtype in (sample, output))
    step = getattr(type(rows.scheduler), step_name(rows.scheduler))
    is_watched = trace.read is not None and can_watch(rows.scheduler)
    n, watch = len(rows.timesteps), Watch() if is_watched else None
    options = dict(rows.key.options_of(rows.scheduler.timesteps, n))
    options |= {"return_dict": False} if "return_dict" in parameters_of(step) else {}
    # In float32, or what a timestep with a dimension makes of it, all steps are as the first ones.
    few = min(n, 2 if rows.stateless else FEW) if {output, sample} == {torch.float32} else n
    try:
        taken = observe(
            rows.scheduler, list(rows.timesteps[:few]), lambda *_: x.clone(), lambda _: m.clone(), lambda: x.double(),
            options, wide=False, watch=watch, tuples=False,
        )  # fmt: skip
    except Exception as error:
        raise Fallback(f"it cannot be run in {output} and {sample}: {error}") from error
    prev, second = taken[0].prev.dtype, None if taken[0].second is None else taken[0].second.dtype
    if any(each.prev.dtype != prev for each in taken) or prev not in (torch.float32, output, sample):
        raise Fallback(f"its results are {', '.join({str(each.prev.dtype) for each in taken})}")
    drawn = [each.step.draws for each in taken]
    drawn += [[torch.float32] * len(step.draws) for step in trace.steps[few:]]
    computed = torch.promote_types(torch.promote_types(output, sample), prev)
    computed = torch.promote_types(computed, second or computed)
    quiet = [used is None and not draws for used, draws in zip(trace.noise, drawn, strict=True)]
    return LoopDtypes(computed, prev, second, drawn, quiet)
