"""A sampler's own loop on numbers of our choice: what tracing observes, and how a scheduler is made to run it.

This knows no library, only the methods that diffusers' schedulers and their like have: set_timesteps, timesteps,
scale_model_input, step (or step_pred).
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ext.base.torch_version import torch_default_device
from ddpm_ext.tables.trace_watch import OTHER_NUMBERS, Watch, Wide, is_simple, wide_arguments

# The names under which a step returns the predicted clean sample.
CLEAN_FIELDS = ("pred_original_sample", "denoised")
# Switches of a config that clip the predicted clean sample. One that divides it by a quantile clips it, too, where a
# sample is one number, as here.
CLIPS = ("clip_sample", "clip_denoised", "thresholding")
# What steps call the model's output, the timestep and the sample.
INPUTS = (("model_output", "score"), ("timestep", "t"), ("sample", "x"))
OTHER_DRAWS = {getattr(of, name) for of in (torch, Tensor) for name in OTHER_NUMBERS if hasattr(of, name)}
SEEN = {torch.randn, torch.randn_like, Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, *OTHER_DRAWS}
# Filters of warnings are the process's: one thread at a time changes them, and puts them back.
_filters = threading.RLock()


class GIVEN:
    """In place of an option: a tensor like the samples, that each step is given. A class is itself in pickles."""


class OtherResults(Exception):
    """Steps return another number of tensors in a tuple than in an object."""


class Result(NamedTuple):
    """What a step returned: its class, and the name of the tensor beside the next sample; None where there is none."""

    cls: type
    name: str | None


class Step(NamedTuple):
    """What one step did.

    Attributes:
        result: what it returned.
        draws: the dtypes of the tensors that it was given beyond sample and output, and then of the normal numbers that
            it drew, in order, as it asked for them.
        state: the attributes of the scheduler that it changed, where they are numbers, also in tensors,
            strings or None.
        tensors: the attributes that are a tensor of the samples' shape after it.
        stores: whether it stores anything else than `state`, such as a tensor.
        holds_output: whether a list of the scheduler's then holds the very tensor that is the model's output.
        given: how many of `draws` are tensors that it was given.
        scaling: the attributes that scale_model_input changed before it.
        is_one: whether the two tensors that it returns are one.
    """

    result: Result
    draws: list[torch.dtype]
    state: dict[str, Any]
    tensors: Sequence[str] = ()
    stores: bool = False
    holds_output: bool = False
    given: int = 0
    scaling: Mapping[str, Any] = MappingProxyType({})
    is_one: bool = False


class Taken(NamedTuple):
    """A step, the next sample, the other tensor that it returned, and what scale_model_input made of its sample before
    it; None where that returned the sample itself, or wrote to it."""

    step: Step
    prev: Tensor
    second: Tensor | None
    scaled: Tensor | None = None


Samples = Callable[[int, Tensor | None], Tensor]
Outputs = Callable[[int], Tensor]
Noise = Callable[[], Tensor]


class Run(NamedTuple):
    """A loop whose samples, outputs and noise are whatever one chooses.

    Attributes:
        times: what the model is called with in each step.
        unit: what these are, for messages.
        observe: the loop's steps. Its arguments are functions: of a step's number and the result of the step before it,
            None before the first, its sample; of a step's number, the model's output; and what the next draw gives;
            and the function `observe`'s arguments `tuples` and `notes`.
        clip: the bound of the range to which the loop clips, if it clips.
        clips: whether it may clip.
        given: how many tensors each step is given beside sample and output.
        dims: how many dimensions samples have.
    """

    times: Sequence[Any]
    unit: str
    observe: Callable[..., list[Taken]]
    clip: float = 1.0
    clips: bool = False
    given: int = 0
    dims: int = 4


class Observed(TorchFunctionMode):
    """Hands out the noise, and computes in float64 what a sampler would cast to less, while it is entered as a mode.

    Args:
        shape: that of the samples.
        noise: makes the next noise of that shape.
        wide: whether samples stay float64; without it, only the noise is handed out.
    """

    def __init__(self, shape: torch.Size, noise: Callable[[], Tensor], wide: bool = True) -> None:
        super().__init__()
        self.shape, self.noise, self.wide = shape, noise, wide
        self.draws: list[torch.dtype] = []
        self._watches = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is called in the meantime is not the sampler's own."""
        before, self._watches = self._watches, False
        try:
            yield
        finally:
            self._watches = before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in SEEN or not self._watches:
            return function(*args, **kwargs)
        if function is torch.randn:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            return self.draw(size, dtype=kwargs.get("dtype"))
        if function is torch.randn_like:
            return self.draw(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function in OTHER_DRAWS:
            raise ValueError(f"a step draws other random numbers than torch.randn's, by {function.__name__}")
        x = args[0] if args else None
        if not (self.wide and isinstance(x, Tensor) and x.dtype == torch.float64 and x.shape == self.shape):
            return function(*args, **kwargs)
        if function is Tensor.to:
            args, kwargs = wide_arguments(args[1:], kwargs)
            return x.to(*args, **kwargs) if args or kwargs else x
        return x

    def draw(self, shape: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        """The next noise, whose dtype is kept in `draws`. The arguments are those of torch.randn and randn_tensor.
        Raises ValueError where it is not of the samples' shape."""
        if torch.Size(shape) != self.shape:
            raise ValueError(f"a step draws noise of shape {tuple(shape)} for samples of shape {tuple(self.shape)}")
        dtype = dtype or torch.get_default_dtype()
        with self.paused():
            z = self.noise()
        self.draws.append(dtype)
        return z.as_subclass(Wide) if self.wide else z.to(dtype)


def step_name(scheduler: Any) -> str:
    """The name of a scheduler's step: step_pred where it is one of a predictor and a corrector."""
    return "step" if hasattr(scheduler, "step") or not hasattr(scheduler, "step_pred") else "step_pred"


def input_names(parameters: Sequence[str]) -> tuple[str, ...]:
    """The names of a step's output, timestep and sample among its parameters: its first three, if they are unknown."""
    found = [next((name for name in names if name in parameters), None) for names in INPUTS]
    return tuple(parameters[:3]) if None in found else tuple(name for name in found if name is not None)


def run_of(
    scheduler: Any,
    timesteps: Sequence[Any],
    options: Mapping[str, Any],
    dims: int = 4,
    watch: Watch | None = None,
) -> Run:
    """A scheduler's loop; the arguments are those of `observe`, and how many dimensions samples have."""
    own = partial(observe, scheduler, timesteps, options=options, watch=watch)
    clips = any(setting(scheduler, name) for name in CLIPS)
    given = sum(value is GIVEN for value in options.values())
    return Run(timesteps, "timestep", own, clip_of(scheduler)[0][1], clips, given, dims)


def observe(
    scheduler: Any,
    timesteps: Sequence[Any],
    samples: Samples,
    outputs: Outputs,
    noise: Noise,
    options: Mapping[str, Any],
    *,
    wide: bool = True,
    watch: Watch | None = None,
    tuples: bool = True,
    notes: bool = True,
) -> list[Taken]:
    """The steps of a copy of `scheduler`.

    Args:
        scheduler: in the state in which a loop begins; it stays as it is.
        timesteps: the scheduler's for the steps, or (1,), of all samples.
        samples, outputs, noise: as Run's observe takes them. What they give is the loop's own, and may be written to.
        options: of every step, beyond the model's output, the timestep and the sample; GIVEN for a tensor like the
            samples, which `noise` makes, too; a list for one of each step.
        wide: whether what is cast to a lower precision stays float64.
        watch: makes the copy, which then runs as fast as the scheduler; None: each of torch's functions that it calls
            is looked at.
        tuples: whether all steps but the first may be asked for tuples, which takes less time than objects.
        notes: whether to tell what each step did; else all are told as the first one.

    Raises:
        ValueError: a step draws other noise than torch.randn's of the samples' shape, or returns anything else than a
            next sample and at most one more tensor.
        OtherResults: tuples are other results.
    """
    x = samples(0, None)
    observed = Observed(x.shape, noise, wide)
    own = copy.deepcopy(scheduler) if watch is None else watch.copy(scheduler, observed.draw)
    given = [name for name, value in options.items() if value is GIVEN]
    of_each = {name: value for name, value in options.items() if type(value) is list}
    made: list[Taken] = []
    with ExitStack() as entered:
        entered.enter_context(_filters)
        entered.enter_context(warnings.catch_warnings())
        entered.enter_context(torch.no_grad())
        entered.enter_context(on_cpu())
        if watch is None:
            entered.enter_context(observed)
        warnings.simplefilter("ignore")
        step = getattr(own, step_name(own))
        parameters = parameters_of(getattr(type(scheduler), step_name(own)))
        names, arguments = input_names(parameters), dict(options)
        if hasattr(own, "noise_sampler"):  # diffusers' schedulers that follow a Brownian path
            own.noise_sampler = lambda *_: observed.draw(observed.shape, dtype=x.dtype)
        scale = getattr(own, "scale_model_input", None)
        for i, t in enumerate(timesteps):
            if i:
                x = samples(i, made[-1].prev)
            m = outputs(i).as_subclass(Wide) if wide else outputs(i)
            before, scaled, scaling = vars(own).copy() if notes else {}, None, {}
            if scale is not None:
                given_x = x.clone()
                scaled = scale(given_x, t)
                if scaled is given_x or given_x._version:
                    scaled = None
                elif notes:
                    scaling = changed(own, before, watch)
            drawn = len(observed.draws)
            for name in given:
                arguments[name] = observed.draw(x.shape, dtype=x.dtype)
            for name, values in of_each.items():
                arguments[name] = values[i]
            if scaling:
                before = vars(own).copy()
            arguments[names[0]], arguments[names[1]], arguments[names[2]] = m, t, x.as_subclass(Wide) if wide else x
            returned = step(**arguments)
            result, prev, second = parts_of(returned)
            if not i:
                first = result
                tuples = tuples and "return_dict" in parameters and "return_dict" not in arguments
                if tuples:
                    arguments["return_dict"] = False
            elif tuples:
                if (first.name is None) != (result.name is None):
                    raise OtherResults
                result = first
            if notes or not i:
                draws, is_one = observed.draws[drawn:], prev is second
                taken = step_of(own, result, m, before, watch, draws, len(given), scaling, is_one)
            made.append(Taken(taken, prev, second, scaled))
    return made


def on_cpu() -> AbstractContextManager[Any]:
    """Where all numbers are, whatever the default device."""
    return nullcontext() if torch_default_device().type == "cpu" else torch.device("cpu")


@functools.lru_cache(maxsize=64)
def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Those of a method, without the object."""
    return tuple(inspect.signature(function).parameters)[1:]


def changed(own: Any, before: Mapping[str, Any], watch: Watch | None = None) -> dict[str, Any]:
    """The attributes of an object that are not those of `before`. What it only read is there from the beginning."""
    read = {} if watch is None else watch.loaded
    return {
        name: value
        for name, value in vars(own).items()
        if before.get(name, before) is not value and (name in before or read.get(name, read) is not value)
    }


def counted_by(steps: Sequence[Step], read: frozenset[str] | None) -> set[str]:
    """The numbers that steps both read and change. read: the names of all that they read; None: nobody knows."""
    changed = set().union(*[step.state for step in steps]).difference(*[step.tensors for step in steps])
    return changed.intersection(read or ())


def step_of(
    own: Any,
    result: Result,
    m: Tensor,
    before: Mapping[str, Any],
    watch: Watch | None,
    draws: list[torch.dtype],
    given: int,
    scaling: Mapping[str, Any],
    is_one: bool,
) -> Step:
    """What a step did to a scheduler, whose attributes were `before`. m: the model's output."""
    shape, state, tensors = m.shape, {}, []
    stores = holds_output = False
    for name, value in vars(own).items():
        if type(value) is list:
            stores = stores or any([isinstance(x, Tensor) for x in value])
            holds_output = holds_output or any([x is m for x in value])
        elif isinstance(value, Tensor) and value.shape == shape:
            tensors.append(name)
    for name, value in changed(own, before, watch).items():
        if is_simple(value):
            state[name] = value
        elif not isinstance(value, torch.Size):  # which any step finds anew
            stores = True
    return Step(result, draws, state, tensors, stores, holds_output, given, scaling, is_one)


def parts_of(returned: Any) -> tuple[Result, Tensor, Tensor | None]:
    if hasattr(returned, "prev_sample"):
        fields = {name: value for name, value in vars(returned).items() if isinstance(value, Tensor)}
        prev = fields.pop("prev_sample")
    elif isinstance(returned, tuple) and returned and all(isinstance(value, Tensor) for value in returned):
        fields, prev = {str(i): value for i, value in enumerate(returned[1:])}, returned[0]
    else:
        raise ValueError(
            f"a step returns a {type(returned).__name__}, expected one with a prev_sample, or a tuple of tensors"
        )
    if len(fields) > 1:
        raise ValueError(f"a step returns {len(fields) + 1} tensors, expected at most 2")
    name, second = next(iter(fields.items()), (None, None))
    return Result(type(returned), name), prev, second


def setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """A setting as diffusers' own code reads it: an edited attribute of a config differs from the config's item."""
    config = getattr(scheduler, "config", {})
    return getattr(config, name, config.get(name, default))


def with_settings(scheduler: Any, **changes: Any) -> Any:
    """A copy with some settings changed."""
    other = copy.deepcopy(scheduler)
    other.register_to_config(**{name: setting(scheduler, name) for name in scheduler.config} | changes)
    return other


def clip_of(scheduler: Any) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The range that a scheduler clips clean samples to, if it clips, and of a dynamic threshold the quantile of their
    magnitudes that they are divided by before, and the largest divisor."""
    if setting(scheduler, "thresholding"):
        return (-1.0, 1.0), (setting(scheduler, "dynamic_thresholding_ratio"), setting(scheduler, "sample_max_value"))
    bound = float(setting(scheduler, "clip_sample_range", 1.0))
    return (-bound, bound), None
