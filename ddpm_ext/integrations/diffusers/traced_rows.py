"""The rows of a traced scheduler's loop, made from the scheduler's state when the loop begins, and their cache."""

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
from ddpm_ext.tables.trace_run import CONFIG, SIMPLE_TYPES, observe, setting

SETTINGS = 16  # for each LoopKey, the cache has the rows of this many states of schedulers
# The names of the attributes that this package adds.
ADDED_NAMES = {*CACHED, "_acceleration", "_position", "_scales_inputs"}
OBSERVED_STEPS = 3  # the number of steps from which the dtypes of a loop in float32 follow
ADDED_ITEMS = ("_class_name", "_diffusers_version")  # items that diffusers adds to a config when it is printed or saved
HASHABLE_TYPES = (bool, int, str, type(None), torch.dtype, torch.device)  # their values are used as cache keys directly
Config = tuple[dict[str, Any], dict[str, Any]]  # (attributes of a config, its items): the two may differ


class ABSENT:
    """Stands for the value of a missing attribute in cache keys.

    It is a class and not an object, since unpickling returns the same class, but would return another object.
    """


class LoopKey(NamedTuple):
    """The cache key of a loop: its steps and their arguments.

    Attributes:
        options: the arguments of each step besides the model's output, the timestep and the sample.
        first: the index of the first step's timestep among the scheduler's timesteps.
        kind: the dtype of timesteps that are tensors, or the class of timesteps that are Python numbers.
        has_dim: whether the timesteps have a dimension, (1,) or (batch,).
        dims: the number of dimensions of the samples.
    """

    options: Options
    first: int
    kind: torch.dtype | type
    has_dim: bool
    dims: int

    def times(self, timesteps: Tensor) -> list[Any]:
        """The timesteps, converted to what the loop's steps are called with."""
        if not isinstance(self.kind, torch.dtype):
            return [self.kind(t) for t in timesteps.tolist()]
        return list((timesteps[:, None] if self.has_dim else timesteps).to(self.kind))


class LoopDtypes(NamedTuple):
    """The dtypes of a loop.

    Attributes:
        computed: the dtype of the operator's tensors.
        prev, second: the dtypes of a step's results. `second` is None if the step returns only the next sample.
        draws: for each step, the dtypes of its draws of noise.
    """

    computed: torch.dtype
    prev: torch.dtype
    second: torch.dtype | None
    draws: list[list[torch.dtype]]


class LoopRows(NamedTuple):
    """The rows of a loop.

    Attributes:
        key: the cache key of the loop.
        times: the timestep with which each row's step is called.
        trace: the result of tracing the loop.
        stepper: takes the rows.
        has_history: whether a step reads tensors of earlier steps, or stores tensors in the scheduler, which later
            steps may read. If so, diffusers' code cannot take a single step of the loop: rows do not store these
            tensors in the scheduler.
        states: for each row, the scheduler's attributes that steps both read and change, such as _step_index, with
            their values before the row. Only numbers, strings and None.
        contents: {name: cache key} of the other attributes that the steps read, of the scheduler or of its class.
        scheduler: a copy of the scheduler from when the loop began, on the CPU.
        dtypes: {(dtype of model outputs, dtype of samples): the loop's dtypes}.
        proofs: {(shape, dtypes, device): the proof of steps that a user wrote}.
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
        """The dtypes of the loop's results and noise for model outputs and samples of these dtypes.

        They are observed in a run of the scheduler's code on small tensors. Raises Fallback if no row can take them.
        """
        dtypes = self.dtypes.get((output, sample))
        if dtypes is None:
            dtypes = self.dtypes[output, sample] = made_outside_autograd(_make_dtypes, self, output, sample)
        return result_of(dtypes)

    def is_at(self, row: int, state: Mapping[str, Any]) -> bool:
        """Whether the scheduler's attributes in `states` have their values before this row.

        Only then would the scheduler's own code take the same step.

        A _step_index of None is accepted: with None, the scheduler's code looks up the index of the timestep.
        """
        numbers, index = self.states[row], "_step_index"
        return all([state.get(n) == x or (n == index and state.get(n, 0) is None) for n, x in numbers.items()])


# ------------------------------------------------------------------------------------------------------------ cache


class CachedRows(NamedTuple):
    """A cache entry: the rows of a scheduler with this config and these contents, or the Fallback of the tracing."""

    config: Config
    contents: dict[str, object]
    rows: LoopRows | Fallback


def rows_of_loop(cls: Any, state: Mapping[str, Any], key: LoopKey, cache: BoundedCache[Any]) -> CachedRows:
    """The cache entry of a loop's rows. The loop is traced if the cache has no entry for the scheduler's state.

    A loop that could not be traced also has an entry, and is not traced again.

    Args:
        state: the attributes of an accelerated object of the class.
    """
    cached: list[CachedRows] = cache.get_or_make((cls, torch.get_default_dtype(), key), list)
    # `content` is cached for this call, so that a tensor on a GPU is read at most once.
    config, content = config_of(state), functools.cache(functools.partial(content_of, cls, state))
    for entry in cached:
        if is_config(config, entry.config) and all(content(name) == x for name, x in entry.contents.items()):
            return entry
    read: set[str] = set()
    rows = made_outside_autograd(trace_rows, cls, state, key, read)
    entry = CachedRows(config, {name: content(name) for name in _relevant(cls, state, read)}, rows)
    # Entries with rows come first. A failed trace may have read few attributes, so its entry may match many states,
    # also states for which another entry has rows.
    latest = cached[: SETTINGS - 1]
    cached[:] = [entry, *latest] if isinstance(rows, LoopRows) else [*latest, entry]
    return entry


def config_of(state: Mapping[str, Any]) -> Config:
    """A copy of the config among a scheduler's attributes, with which is_config compares a later one."""
    return dict(vars(state[CONFIG])), dict(state[CONFIG])


def is_config(config: Config, other_config: Config) -> bool:
    """Whether two configs are equal, apart from the items that diffusers adds when a config is printed or saved."""
    try:
        return config == other_config or _without_added_items(config) == _without_added_items(other_config)
    except ValueError:  # the truth value of a comparison of arrays is ambiguous
        return False


def _without_added_items(config: Config) -> list[dict[str, Any]]:
    """The config without the items that diffusers adds when the config is printed or saved."""
    return [{name: x for name, x in part.items() if name not in ADDED_ITEMS} for part in config]


def _relevant(cls: Any, state: Mapping[str, Any], read: set[str]) -> set[str]:
    """The names in `read` that count as the state of a scheduler: attributes, methods and missing attributes.

    `timesteps` counts always. Properties do not count: the attributes that they read are in `read`, too. Nor do names
    that begin with two underscores, and the config, which is_config compares.
    """
    names = {*read, "timesteps"} - {CONFIG} - {name for name in read if name.startswith("__")}
    return {name for name in names if name in state or not hasattr(getattr(cls, name, ABSENT), "__set__")}


def content_of(cls: Any, state: Mapping[str, Any], name: str) -> object:
    """A cache key of an attribute of the object, or else of its class. Raises Fallback for a type without a key."""
    return _content_key(state[name] if name in state else getattr(cls, name, ABSENT))


def _content_key(value: Any) -> object:
    """A cache key of a value. Raises Fallback for a type without a key."""
    if isinstance(value, Tensor):
        return tensor_contents(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype, value.shape, value.tobytes()
    if type(value) is float:
        return value.hex()  # so that NaN equals NaN, and -0 differs from 0
    if isinstance(value, list | tuple):
        return type(value), *map(_content_key, value)
    if isinstance(value, dict):
        return tuple((key, _content_key(x)) for key, x in value.items())
    if value is ABSENT or isinstance(value, FunctionType | MethodType):
        return value
    if isinstance(value, HASHABLE_TYPES):
        return type(value), value
    raise Fallback(f"its state cannot be compared: it holds a {type(value).__name__}")


# ------------------------------------------------------------------------------------------------------------ rows


def _recording_reads(scheduler: Any, read: set[str]) -> Any:
    """Makes the scheduler add to `read` the names of attributes that are read before they are written.

    Copies of the scheduler also add them.
    """
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
    """Traces a loop and returns its rows. Raises Fallback if a step can't be expressed as a row.

    Args:
        read: a set to which the names of the attributes that the scheduler reads are added.
    """
    scheduler, recording, first = new(cls), _recording_reads(new(cls), read), key.first
    attributes = {n: x.detach().cpu() if isinstance(x, Tensor) else x for n, x in state.items() if n not in ADDED_NAMES}
    vars(scheduler).update(attributes), vars(recording).update(attributes)
    times = key.times(scheduler.timesteps[first:])
    try:
        options = options_of_steps(key.options, scheduler.timesteps, first, len(times))
        trace = follow(recording, times, options, dims=key.dims)
        n, columns = len(trace.steps), trace.columns
        # Rows of a part of a loop have the same noise as in the whole loop.
        all_times = numbers("timestep", scheduler.timesteps)
        columns = columns | {
            "draw": default_draws(all_times)[first:][:n],
            "cu": np.array(trace.of_last),
            "c1": columns["c1"] - trace.of_last,
        }
        packed = packed_rows(columns)
    except Exception as error:  # A scheduler's code may raise anything, and will raise it again after the fallback.
        raise Fallback(f"it cannot be traced: {error}") from error
    if trace.steps[0].result.name is not None and not trace.second:
        raise Fallback("its step returns a second tensor, which is not of sample and output alone")
    threshold = clip_of(scheduler.config)[1] if trace.clip is not None and setting(scheduler, "thresholding") else None
    table = functools.partial(table_of_checked, columns)
    stepper = RowStepper(table, trace.clip, threshold, packed=packed)
    if trace.scales is not None and not any(trace.of_last) and not any(step.scale_counts for step in trace.steps[1:]):
        stepper = stepper.for_inputs(torch.from_numpy(np.append(trace.scales[1:], 1.0)).float())
    else:
        trace = trace._replace(scales=None)
    keeps = any(needs.keeps for needs in stepper.needs) or any(step.stores for step in trace.steps)
    has_history = keeps or any(trace.of_last)
    changed_names, relevant = {name for step in trace.steps for name in step.state}, _relevant(cls, attributes, read)
    states = [{name: attributes.get(name) for name in changed_names & relevant}]
    for step in trace.steps[:-1]:
        states.append({name: step.state.get(name, value) for name, value in states[-1].items()})
    tensors = {name for state in states for name, value in state.items() if type(value) not in SIMPLE_TYPES}
    states = [{name: value for name, value in state.items() if name not in tensors} for state in states]
    contents = {name: content_of(cls, attributes, name) for name in relevant - changed_names - {"_begin_index"}}
    return LoopRows(key, times[:n], trace, stepper, has_history, states, contents, scheduler, {}, {})


def _make_dtypes(rows: LoopRows, output: torch.dtype, sample: torch.dtype) -> LoopDtypes:
    """Runs the scheduler's code on two small samples to observe its dtypes."""
    key, steps = rows.key, rows.trace.steps
    # If outputs and samples are float32, all steps have the dtypes of the first ones.
    n = len(steps)
    count = min(n, OBSERVED_STEPS) if {output, sample} == {torch.float32} else n
    x, m = (torch.full((2, *[1] * (key.dims - 1)), 0.5, dtype=dtype, device="cpu") for dtype in (sample, output))
    try:
        samples, outputs = ([tensor.clone() for _ in range(count)] for tensor in (x, m))
        options = options_of_steps(key.options, rows.scheduler.timesteps, key.first, n)
        steps_taken = observe(
            rows.scheduler, rows.times, samples, outputs, lambda *_: x.double(), options, keeps_float64=False
        )
    except Exception as error:
        raise Fallback(f"it cannot be run in {output} and {sample}: {error}") from error
    prev, second = steps_taken[0].prev.dtype, None if steps_taken[0].second is None else steps_taken[0].second.dtype
    if any(step.prev.dtype != prev for step in steps_taken) or prev not in (torch.float32, output, sample):
        raise Fallback(f"its results are {', '.join({str(step.prev.dtype) for step in steps_taken})}")
    draws = [step.draws for step in steps_taken] + [[torch.float32] * len(step.draws) for step in steps[count:]]
    computed = torch.promote_types(torch.promote_types(output, sample), prev)
    return LoopDtypes(torch.promote_types(computed, second or computed), prev, second, draws)
