"""Runs a scheduler's loop on chosen inputs and records each step, for tracing.

This module imports none of the libraries whose schedulers it runs. It calls the methods that diffusers' schedulers and
similar objects have: scale_model_input and step (or step_pred).
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ext.base.torch_version import torch_default_device

# The names under which a step returns the predicted clean sample.
CLEAN_FIELDS = ("pred_original_sample", "denoised")
# Options of a config that clip the predicted clean sample. Thresholding counts as a clip: where a sample is a single
# number, as in the first run, it has the same effect.
CLIPS = ("clip_sample", "clip_denoised", "thresholding")
# The names of a step method's parameters for the model output, the timestep and the sample.
INPUTS = (("model_output", "score"), ("timestep", "t"), ("sample", "x"))
# The dtypes of lower precision than float64, and the functions that Observed intercepts.
LOW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERCEPTED = {torch.randn, torch.randn_like, Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16}
SIMPLE_TYPES = {bool, int, float, str, type(None)}
CONFIG = "_internal_dict"  # the attribute of diffusers' schedulers that has their configuration
# Warning filters are shared by all threads of the process, so only one thread at a time may change and restore them.
_filters = threading.RLock()


class GIVEN:
    """Stands for the value of an option that is a tensor of the samples' shape, a different one in each step.

    It is a class and not an object, since unpickling returns the same class, but would return another object.
    """


class Result(NamedTuple):
    """The class of a step's result, and the name of its second tensor, None if there is only the next sample."""

    cls: type
    name: str | None


class Step(NamedTuple):
    """The observed effects of one step.

    Attributes:
        result: the class of what the step returned, and the name of `second`.
        prev, second: the next sample, and the other tensor that the step returned, or None.
        draws: the dtypes of the tensors that were passed to the step for GIVEN options, then of the normal numbers that
            it drew, in order.
        state: {attribute of the scheduler: its new value}, of the simple attributes (is_simple) that the step changed.
        stores: whether the step stores anything else in the scheduler, such as a tensor.
        scaled: the result of scale_model_input for the step's sample, or None if the scheduler has no such method, or
            it returned or changed the sample itself.
        scale_counts: whether scale_model_input changed an attribute of the scheduler.
    """

    result: Result
    prev: Any
    second: Any
    draws: list[torch.dtype]
    state: Mapping[str, Any] = MappingProxyType({})
    stores: bool = False
    scaled: Any = None
    scale_counts: bool = False


Draw = Callable[[int, int], Tensor]  # (number of the step, number of its draw) -> a tensor of normal numbers


class Run(NamedTuple):
    """A loop that runs on chosen samples, model outputs and noise.

    Attributes:
        times: the timestep or sigma with which the model is called in each step.
        unit: "timestep" or "sigma", for messages.
        observe: runs the loop and returns its steps. Its arguments are the samples of all steps (a step's sample is not
            the previous step's result), the model's outputs, and a Draw. The loop may write to samples and outputs.
        clip: the upper end of the range to which the loop clips, or None if it does not clip. The lower end is -clip.
        dims: the samples' number of dimensions.
        option_tensors: the number of tensors that each step gets for GIVEN options.
        follows_previous: whether outside of tracing each sample is the previous step's result, because callers cannot
            edit samples between steps.
    """

    times: Sequence[Any]
    unit: str
    observe: Callable[[Sequence[Tensor], Sequence[Tensor], Draw], list[Step]]
    clip: float | None = None
    dims: int = 4
    option_tensors: int = 0
    follows_previous: bool = False


class Observed(TorchFunctionMode):
    """A mode in which torch.randn and randn_like return what `noise` makes, and samples are not cast from float64 to
    lower precision.

    Args:
        shape: the samples' shape.
        noise: makes the random numbers of a step's draws.
        keeps_float64: whether samples stay float64. If False, the mode only replaces random numbers, those of the
            samples' shape.

    Attributes:
        step: the number of the current step.
        draws: the dtypes of the tensors that the current step has drawn.
    """

    def __init__(self, shape: torch.Size, noise: Draw, keeps_float64: bool = True) -> None:
        super().__init__()
        self.shape, self.noise, self.keeps_float64 = shape, noise, keeps_float64
        self.step = 0
        self.draws: list[torch.dtype] = []
        self._watches = True

    def begin(self, step: int) -> None:
        """Called when step number `step` begins."""
        self.step, self.draws = step, []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context for code that is not the sampler's: the mode does not change its calls."""
        before, self._watches = self._watches, False
        try:
            yield
        finally:
            self._watches = before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in INTERCEPTED or not self._watches:
            return function(*args, **kwargs)
        if function is torch.randn:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if not self.keeps_float64 and torch.Size(size) != self.shape:
                return function(*args, **kwargs)
            return self.draw(size, kwargs.get("dtype"))
        if function is torch.randn_like and (self.keeps_float64 or args[0].shape == self.shape):
            return self.draw(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        x = args[0] if args else None
        if not (self.keeps_float64 and isinstance(x, Tensor) and x.dtype == torch.float64 and x.shape == self.shape):
            return function(*args, **kwargs)
        if function is not Tensor.to:
            return x
        args = tuple(y for y in args[1:] if not (isinstance(y, torch.dtype) and y in LOW_DTYPES))
        kwargs = {name: y for name, y in kwargs.items() if not (name == "dtype" and y in LOW_DTYPES)}
        return x.to(*args, **kwargs) if args or kwargs else x

    def draw(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        """The step's next random tensor. Raises ValueError if `shape` is not the samples' shape."""
        if torch.Size(shape) != self.shape:
            raise ValueError(f"a step draws noise of shape {tuple(shape)} for samples of shape {tuple(self.shape)}")
        dtype = dtype or torch.get_default_dtype()
        with self.paused():
            z = self.noise(self.step, len(self.draws))
            self.draws.append(dtype)
            return z if self.keeps_float64 else z.to(dtype)


def step_name(scheduler: Any) -> str:
    """The name of a scheduler's step method: step_pred for a predictor-corrector scheduler without `step`."""
    return "step" if hasattr(scheduler, "step") or not hasattr(scheduler, "step_pred") else "step_pred"


def input_names(parameters: Sequence[str]) -> tuple[str, ...]:
    """The names of a step's parameters for output, timestep and sample: its first three if the names are unknown."""
    recognized = [next((name for name in names if name in parameters), None) for names in INPUTS]
    return tuple(parameters[:3]) if None in recognized else tuple(name for name in recognized if name is not None)


def run_of(scheduler: Any, times: Sequence[Any], options: Mapping[str, Any], dims: int) -> Run:
    """A scheduler's loop. The arguments are those of `observe`, and the samples' number of dimensions."""
    steps = functools.partial(observe, scheduler, times, options=options)
    clip = clip_of(scheduler)[0][1] if any(setting(scheduler, name) for name in CLIPS) else None
    return Run(times, "timestep", steps, clip, dims, sum(value is GIVEN for value in options.values()))


def observe(
    scheduler: Any,
    times: Sequence[Any],
    samples: Sequence[Tensor],
    outputs: Sequence[Tensor],
    noise: Draw,
    options: Mapping[str, Any],
    *,
    keeps_float64: bool = True,
) -> list[Step]:
    """Runs the steps of a copy of `scheduler` and records them.

    Args:
        scheduler: in the state in which a loop begins. It stays unchanged.
        times: the timesteps with which the steps are called, each a number, or (1,), for all samples.
        samples, outputs, noise: see Run.observe.
        options: arguments of every step in addition to the model output, the timestep and the sample. GIVEN stands for
            a tensor of the samples' shape, which `noise` makes. A list has a value for each step.
        keeps_float64: whether casts to a lower precision are ignored, so that numbers stay float64.

    Raises:
        ValueError: a step draws noise of a shape other than the samples', or returns anything but a next sample and at
            most one more tensor.
    """
    scheduler, observed = copy.deepcopy(scheduler), Observed(samples[0].shape, noise, keeps_float64)
    state, step = scheduler.__dict__, getattr(scheduler, step_name(scheduler))
    names, arguments = input_names([*parameters_of_step(scheduler.__class__)]), dict(options)
    scale = getattr(scheduler, "scale_model_input", None)
    if hasattr(scheduler, "noise_sampler"):  # diffusers' schedulers whose noise is a Brownian path
        scheduler.noise_sampler = lambda *_: observed.draw(observed.shape, samples[0].dtype)
    observed_steps: list[Step] = []
    with _filters, warnings.catch_warnings(), torch.no_grad(), on_cpu(), fresh_numbers(), observed:
        warnings.simplefilter("ignore")
        for i, (t, x, m) in enumerate(zip(times, samples, outputs, strict=False)):
            observed.begin(i)
            before, scaled = state.copy(), None
            if scale is not None:
                with observed.paused():
                    to_scale = x.clone()
                scaled = scale(to_scale, t)
                scaled = None if scaled is to_scale or to_scale._version else scaled
            scale_counts = any(before.get(name, before) is not value for name, value in state.items())
            for name, value in options.items():
                if value is GIVEN:
                    arguments[name] = observed.draw(x.shape, x.dtype)
                elif type(value) is list:
                    arguments[name] = value[i]
            arguments[names[0]], arguments[names[1]], arguments[names[2]] = m, t, x
            result, prev, second = parts_of(step(**arguments))
            changed = {name: value for name, value in state.items() if before.get(name, before) is not value}
            simple = {name: value for name, value in changed.items() if is_simple(value)}
            in_lists = [x for value in state.values() if type(value) is list for x in value]
            stores = any(name not in simple and not isinstance(value, torch.Size) for name, value in changed.items())
            stores = stores or any(isinstance(x, Tensor) for x in in_lists)
            observed_steps.append(Step(result, prev, second, observed.draws, simple, stores, scaled, scale_counts))
    return observed_steps


def on_cpu() -> AbstractContextManager[Any]:
    """A context in which the default device is the CPU, where all numbers are."""
    return nullcontext() if torch_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def fresh_numbers() -> Iterator[None]:
    """A context in which torch's generator has a new random seed; at the end, its state is restored.

    So a step that draws from the generator, without Observed noticing it, has different results in the two runs and
    fails the comparison with its row.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.seed()
        yield


@functools.lru_cache(maxsize=64)
def parameters_of_step(cls: type) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class's step, without `self`.

    If the step has `*args` or `**kwargs`, it probably passes them to the parent's step, whose parameters are returned.
    """
    name, parameters = step_name(cls), dict[str, inspect.Parameter]()
    for base in cls.__mro__:
        if name in vars(base):
            parameters = dict(list(inspect.signature(vars(base)[name]).parameters.items())[1:])
            if not any(
                parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters.values()
            ):
                break
    return parameters


def is_simple(value: object) -> bool:
    """Whether the value is a number, a tensor with a single number and no dimensions, a string or None."""
    return type(value) in SIMPLE_TYPES or (isinstance(value, Tensor) and not value.dim())


def parts_of(returned: Any) -> tuple[Result, Tensor, Tensor | None]:
    """Splits what a step returned into its description, the next sample, and the second tensor or None."""
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
    """A setting as diffusers' code reads it: the config's attribute, which may have been edited, or else its item."""
    config = getattr(scheduler, "config", {})
    return getattr(config, name, config.get(name, default))


def clip_of(scheduler: Any) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """Returns the range to which a scheduler with a clip clips clean samples, and its dynamic thresholding.

    Dynamic thresholding divides clean samples by a quantile of their magnitudes before the clip. It is returned as
    (quantile, largest divisor), or None if the scheduler has none.
    """
    if setting(scheduler, "thresholding"):
        return (-1.0, 1.0), (setting(scheduler, "dynamic_thresholding_ratio"), setting(scheduler, "sample_max_value"))
    bound = float(setting(scheduler, "clip_sample_range", 1.0))
    return (-bound, bound), None
