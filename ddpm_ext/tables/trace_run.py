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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ext.base.torch_version import torch_default_device

# The names under which a step returns the predicted clean sample.
CLEAN_FIELDS = ("pred_original_sample", "denoised")
# Switches of a config that clip the predicted clean sample. One that divides it by a quantile clips it, too, where a
# sample is one number, as in the run that finds the rows.
CLIPS = ("clip_sample", "clip_denoised", "thresholding")
# What steps call the model's output, the timestep and the sample.
INPUTS = (("model_output", "score"), ("timestep", "t"), ("sample", "x"))
NARROW = (torch.float32, torch.float16, torch.bfloat16)
SEEN = {torch.randn, torch.randn_like, Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16}
CONSTANT = {bool, int, float, str, type(None)}
CONFIG = "_internal_dict"  # the attribute of diffusers' schedulers that has their configuration
# Filters of warnings are the process's: one thread at a time changes them, and puts them back.
_filters = threading.RLock()


class GIVEN:
    """In place of an option: a tensor like the samples, that each step is given. A class is itself in pickles."""


class Result(NamedTuple):
    """What a step returned: its class, and the name of the tensor beside the next sample; None where there is none."""

    cls: type
    name: str | None


class Step(NamedTuple):
    """What one step did.

    Attributes:
        result: what it returned.
        prev, second: the next sample, and the other tensor that it returned.
        draws: the dtypes of the tensors that it was given beyond sample and output, and then of the normal numbers that
            it drew, in order, as it asked for them.
        state: the attributes of the scheduler that it changed, where they are numbers, also in tensors, strings or
            None.
        stores: whether it stores anything else, such as a tensor.
        scaled: what scale_model_input made of its sample before it; None where that returned the sample itself.
        scale_counts: whether scale_model_input changed an attribute.
    """

    result: Result
    prev: Any
    second: Any
    draws: list[torch.dtype]
    state: Mapping[str, Any] = MappingProxyType({})
    stores: bool = False
    scaled: Any = None
    scale_counts: bool = False


Draw = Callable[[int, int], Tensor]  # of a step's number and how many it had before: a tensor of normal numbers


class Run(NamedTuple):
    """A loop whose samples, outputs and noise are whatever one chooses.

    Attributes:
        times: what the model is called with in each step.
        unit: what these are, for messages.
        observe: the loop's steps. Its arguments are the samples of all steps, which do not follow from each other, the
            model's outputs, and a Draw. Samples and outputs are the loop's own, and may be written to.
        clip: the bound of the range to which the loop clips; None where it does not clip.
        dims: how many dimensions samples have.
        given: how many tensors each step is given beside sample and output.
        follows: whether nobody can edit a sample between two steps.
    """

    times: Sequence[Any]
    unit: str
    observe: Callable[[Sequence[Tensor], Sequence[Tensor], Draw], list[Step]]
    clip: float | None = None
    dims: int = 4
    given: int = 0
    follows: bool = False


class Observed(TorchFunctionMode):
    """Hands out the noise, and computes in float64 what a sampler would cast to less, while it is entered as a mode.

    Args:
        shape: that of the samples.
        noise: makes the noise.
        wide: whether samples stay float64; without it, only the noise is handed out.

    Attributes:
        step: the number of the step that draws.
        draws: the dtypes of what it has drawn.
    """

    def __init__(self, shape: torch.Size, noise: Draw, wide: bool = True) -> None:
        super().__init__()
        self.shape, self.noise, self.wide = shape, noise, wide
        self.step = 0
        self.draws: list[torch.dtype] = []
        self._watches = True

    def begin(self, step: int) -> None:
        self.step, self.draws = step, []

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
            if not self.wide and torch.Size(size) != self.shape:
                return function(*args, **kwargs)
            return self.draw(size, kwargs.get("dtype"))
        if function is torch.randn_like and (self.wide or args[0].shape == self.shape):
            return self.draw(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        x = args[0] if args else None
        if not (self.wide and isinstance(x, Tensor) and x.dtype == torch.float64 and x.shape == self.shape):
            return function(*args, **kwargs)
        if function is not Tensor.to:
            return x
        args = tuple(y for y in args[1:] if not (isinstance(y, torch.dtype) and y in NARROW))
        kwargs = {name: y for name, y in kwargs.items() if not (name == "dtype" and y in NARROW)}
        return x.to(*args, **kwargs) if args or kwargs else x

    def draw(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        """The next noise. Raises ValueError where it is not of the samples' shape."""
        if torch.Size(shape) != self.shape:
            raise ValueError(f"a step draws noise of shape {tuple(shape)} for samples of shape {tuple(self.shape)}")
        dtype = dtype or torch.get_default_dtype()
        with self.paused():
            z = self.noise(self.step, len(self.draws))
            self.draws.append(dtype)
            return z if self.wide else z.to(dtype)


def step_name(scheduler: Any) -> str:
    """The name of a scheduler's step: step_pred where it is one of a predictor and a corrector."""
    return "step" if hasattr(scheduler, "step") or not hasattr(scheduler, "step_pred") else "step_pred"


def input_names(parameters: Sequence[str]) -> tuple[str, ...]:
    """The names of a step's output, timestep and sample among its parameters: its first three, if they are unknown."""
    known = [next((name for name in names if name in parameters), None) for names in INPUTS]
    return tuple(parameters[:3]) if None in known else tuple(name for name in known if name is not None)


def run_of(scheduler: Any, times: Sequence[Any], options: Mapping[str, Any], dims: int) -> Run:
    """A scheduler's loop; the arguments are those of `observe`, and how many dimensions samples have."""
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
    wide: bool = True,
) -> list[Step]:
    """The steps of a copy of `scheduler`.

    Args:
        scheduler: in the state in which a loop begins; it stays as it is.
        times: the scheduler's timesteps for the steps, or (1,), of all samples.
        samples, outputs, noise: as Run's observe takes them.
        options: of every step, beyond the model's output, the timestep and the sample; GIVEN for a tensor like the
            samples, which `noise` makes, too; a list for one of each step.
        wide: whether what is cast to a lower precision stays float64.

    Raises:
        ValueError: a step draws other noise than torch.randn's of the samples' shape, or returns anything else than a
            next sample and at most one more tensor.
    """
    scheduler, observed = copy.deepcopy(scheduler), Observed(samples[0].shape, noise, wide)
    state, step = scheduler.__dict__, getattr(scheduler, step_name(scheduler))
    names, arguments = input_names([*parameters_of_step(scheduler.__class__)]), dict(options)
    scale = getattr(scheduler, "scale_model_input", None)
    if hasattr(scheduler, "noise_sampler"):  # diffusers' schedulers that follow a Brownian path
        scheduler.noise_sampler = lambda *_: observed.draw(observed.shape, samples[0].dtype)
    made: list[Step] = []
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
            made.append(Step(result, prev, second, observed.draws, simple, stores, scaled, scale_counts))
    return made


def on_cpu() -> AbstractContextManager[Any]:
    """Where all numbers are, whatever the default device."""
    return nullcontext() if torch_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def fresh_numbers() -> Iterator[None]:
    """Torch's generator draws other numbers in each run, so that a step that draws its own is not linear. Afterwards
    the generator is as it was."""
    with torch.random.fork_rng([]):
        torch.default_generator.seed()
        yield


@functools.lru_cache(maxsize=64)
def parameters_of_step(cls: type) -> Mapping[str, inspect.Parameter]:
    """Those of a class's step, without the object. A step that takes `*args` or `**kwargs` passes them on: then they
    are those of the class's parent."""
    name, parameters = step_name(cls), dict[str, inspect.Parameter]()
    for base in cls.__mro__:
        if name in vars(base):
            parameters = dict(list(inspect.signature(vars(base)[name]).parameters.items())[1:])
            if not any(taken.kind in (taken.VAR_POSITIONAL, taken.VAR_KEYWORD) for taken in parameters.values()):
                break
    return parameters


def is_simple(value: object) -> bool:
    """Whether it is a number, also in a tensor, a string or None."""
    return type(value) in CONSTANT or (isinstance(value, Tensor) and not value.dim())


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


def clip_of(scheduler: Any) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The range that a scheduler clips clean samples to, if it clips, and of a dynamic threshold the quantile of their
    magnitudes that they are divided by before, and the largest divisor."""
    if setting(scheduler, "thresholding"):
        return (-1.0, 1.0), (setting(scheduler, "dynamic_thresholding_ratio"), setting(scheduler, "sample_max_value"))
    bound = float(setting(scheduler, "clip_sample_range", 1.0))
    return (-bound, bound), None
