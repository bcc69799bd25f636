"""A sampler's own loop on numbers of our choice: what tracing observes, and how a scheduler is made to run it.

This knows no library, only the methods that diffusers' schedulers and their like have: set_timesteps, timesteps,
scale_model_input, step (or step_pred).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The names under which a step returns the predicted clean sample.
CLEAN_FIELDS = ("pred_original_sample", "denoised")
# Switches of a config that clip the predicted clean sample. One that divides it by a quantile clips it, too, where a
# sample is one number, as here.
CLIPS = ("clip_sample", "clip_denoised", "thresholding")
# In place of an option: a tensor like the samples, which each step is given.
GIVEN = object()
# What steps call the model's output, the timestep and the sample.
INPUTS = (("model_output", "score"), ("timestep", "t"), ("sample", "x"))
NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
OTHER_DRAWS = {
    torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.normal, torch.bernoulli,
    torch.multinomial, torch.poisson, Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_,
    Tensor.random_,
}  # fmt: skip


class Result(NamedTuple):
    """What a step returned.

    Attributes:
        cls: its class.
        prev: the next sample.
        name, second: the other tensor of the result and its name; None where there is none.
    """

    cls: type
    prev: Tensor
    name: str | None
    second: Tensor | None


class Step(NamedTuple):
    """What one step did.

    Attributes:
        result: what it returned.
        draws: the tensors that it was given beyond sample and output, and then the normal numbers that it drew, in
            order, and the dtype of each in which it asked for them.
        state: the attributes of the scheduler that it changed, where they are numbers, also in tensors,
            strings or None.
        tensors: the attributes that are a tensor of the samples' shape after it, or a list, which may hold such.
        stores: whether it stores anything else than `state`, such as a tensor.
        sample, output: what it was called with.
        given: how many of `draws` are tensors that it was given.
    """

    result: Result
    draws: list[tuple[Tensor, torch.dtype]]
    state: dict[str, Any]
    tensors: dict[str, Any]
    stores: bool
    sample: Tensor | None = None
    output: Tensor | None = None
    given: int = 0


Samples = Callable[[int, Tensor | None], Tensor]
Outputs = Callable[[int], Tensor]
Noise = Callable[[], Tensor]


class Run(NamedTuple):
    """A loop whose samples, outputs and noise are whatever one chooses.

    Attributes:
        times: what the model is called with in each step.
        unit: what these are, for messages.
        observe: the loop's steps. Its arguments are functions: of a step's number and the result of the step before it,
            None before the first, its sample; of a step's number, the model's output; and what the next draw gives.
        clip: the bound of the range to which the loop clips, if it clips.
        dims: how many dimensions samples have.
    """

    times: Sequence[Any]
    unit: str
    observe: Callable[[Samples, Outputs, Noise], list[Step]]
    clip: float = 1.0
    dims: int = 4


class Observed(TorchFunctionMode):
    """Hands out the noise, and computes in float64 what a scheduler would cast to less.

    Args:
        shape: that of the samples.
        noise: makes the next noise of that shape.
        wide: whether samples stay float64; without it, only the noise is handed out.
    """

    def __init__(self, shape: torch.Size, noise: Callable[[], Tensor], wide: bool = True) -> None:
        super().__init__()
        self.shape, self.noise, self.wide = shape, noise, wide
        self.draws: list[tuple[Tensor, torch.dtype]] = []
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
        if not self._watches:
            return function(*args, **kwargs)
        if function is torch.randn:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            return self.draw(torch.Size(size), kwargs.get("dtype") or torch.get_default_dtype())
        if function is torch.randn_like:
            return self.draw(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if function in OTHER_DRAWS:
            raise ValueError(f"a step draws other random numbers than torch.randn's, by {function.__name__}")
        if self.wide and args and isinstance(args[0], Tensor) and self._is_sample(args[0]):
            if function in CASTS:
                return args[0]
            if function is Tensor.to:
                args = tuple(x for x in args if not (isinstance(x, torch.dtype) and x in NARROW))
                kwargs = {name: x for name, x in kwargs.items() if not (name == "dtype" and x in NARROW)}
                if len(args) == 1 and not kwargs:
                    return args[0]
        return function(*args, **kwargs)

    def _is_sample(self, x: Tensor) -> bool:
        return x.dtype == torch.float64 and x.shape == self.shape

    def draw(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The next noise, which is kept in `draws`, too. Raises ValueError where it is not of the samples' shape."""
        if shape != self.shape:
            raise ValueError(f"a step draws noise of shape {tuple(shape)} for samples of shape {tuple(self.shape)}")
        with self.paused():
            z = self.noise()
        self.draws.append((z, dtype))
        return z if self.wide else z.to(dtype)


def step_name(scheduler: Any) -> str:
    """The name of a scheduler's step: step_pred where it is one of a predictor and a corrector."""
    return "step" if hasattr(scheduler, "step") or not hasattr(scheduler, "step_pred") else "step_pred"


def input_names(parameters: Sequence[str]) -> tuple[str, ...]:
    """The names of a step's output, timestep and sample among its parameters: its first three, if they are unknown."""
    found = [next((name for name in names if name in parameters), None) for names in INPUTS]
    return tuple(parameters[:3]) if None in found else tuple(name for name in found if name is not None)


def run_of(scheduler: Any, timesteps: Sequence[Any], options: Mapping[str, Any], dims: int = 4) -> Run:
    """A scheduler's loop; the arguments are those of `observe`, and how many dimensions samples have."""
    own = partial(observe, scheduler, timesteps, options=options)
    return Run(timesteps, "timestep", own, clip_of(scheduler)[1], dims)


def observe(
    scheduler: Any,
    timesteps: Sequence[Any],
    samples: Samples,
    outputs: Outputs,
    noise: Noise,
    options: Mapping[str, Any],
    *,
    wide: bool = True,
) -> list[Step]:
    """The steps of a copy of `scheduler`.

    Args:
        scheduler: in the state in which a loop begins; it stays as it is.
        timesteps: those of the steps, as the scheduler has them, or (1,), of all samples.
        samples, outputs, noise: as Run's observe takes them.
        options: of every step, beyond the model's output, the timestep and the sample; GIVEN for a tensor like the
            samples, which `noise` makes, too.
        wide: whether what is cast to a lower precision stays float64.

    Raises:
        ValueError: a step draws other noise than torch.randn's of the samples' shape, or returns anything else than a
            next sample and at most one more tensor.
    """
    own = copy.deepcopy(scheduler)
    step = getattr(own, step_name(own))
    names = input_names(list(inspect.signature(step).parameters))
    made: list[Step] = []
    for i, t in enumerate(timesteps):
        x, m = samples(i, made[-1].result.prev if made else None), outputs(i)
        quiet, cpu = warnings.catch_warnings(), torch.device("cpu")  # where all numbers are, whatever the default
        with quiet, cpu, torch.no_grad(), Observed(x.shape, noise, wide) as observed:
            warnings.simplefilter("ignore")
            if hasattr(own, "noise_sampler"):  # diffusers' schedulers that follow a Brownian path
                own.noise_sampler = partial(_sample, x)
            if hasattr(own, "scale_model_input"):
                own.scale_model_input(x.clone(), t)
            given = {name: torch.randn_like(x) if value is GIVEN else value for name, value in options.items()}
            before = dict(vars(own))
            result = _parts(step(**dict(zip(names, (m, t, x.clone()), strict=True)), **given))
        changes = {name: value for name, value in vars(own).items() if before.get(name, before) is not value}
        state = {name: value for name, value in changes.items() if _is_simple(value)}
        tensors = {name: copy.copy(value) for name, value in vars(own).items() if _holds(value, x.shape)}
        lists = (value for value in vars(own).values() if isinstance(value, list))
        stores = len(state) < len(changes) or any(isinstance(x, Tensor) for values in lists for x in values)
        number = sum(value is GIVEN for value in options.values())
        made.append(Step(result, observed.draws, state, tensors, stores, x, m, number))
    return made


def _sample(x: Tensor, *_: Any) -> Tensor:
    """Noise for a scheduler that samples it between two ends of a path."""
    return torch.randn_like(x)


def _holds(value: object, shape: torch.Size) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.shape == shape)


def _is_simple(value: object) -> bool:
    return (
        value is None or isinstance(value, bool | int | float | str) or (isinstance(value, Tensor) and not value.dim())
    )


def _parts(returned: Any) -> Result:
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
    return Result(type(returned), prev, name, second)


def setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """A setting as diffusers' own code reads it: an edited attribute of a config differs from the config's item."""
    config = getattr(scheduler, "config", {})
    return getattr(config, name, config.get(name, default))


def with_settings(scheduler: Any, **changes: Any) -> Any:
    """A copy with some settings changed."""
    other = copy.deepcopy(scheduler)
    other.register_to_config(**{name: setting(scheduler, name) for name in scheduler.config} | changes)
    return other


def without_clip(scheduler: Any) -> Any:
    """A copy that does not clip the predicted clean sample; the scheduler itself where it does not clip."""
    switches = [name for name in CLIPS if setting(scheduler, name)]
    return with_settings(scheduler, **dict.fromkeys(switches, False)) if switches else scheduler


def clip_of(scheduler: Any) -> tuple[float, float]:
    """The range that a scheduler clips to, if it clips."""
    bound = 1.0 if setting(scheduler, "thresholding") else float(setting(scheduler, "clip_sample_range", 1.0))
    return -bound, bound
