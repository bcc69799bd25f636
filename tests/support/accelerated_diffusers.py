"""Compares a step of an accelerated scheduler with the same step of diffusers.

The error of a result is its largest difference from the result of diffusers' code run in float64. Our error may be at
most the larger of FACTOR times diffusers' error and ULPS ulps of the largest value. With 16-bit samples, FACTOR and
ULPS are replaced by 1. If our error is larger, the bound also takes diffusers' errors and the largest values of many
similar steps into account (see `check`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import torch
from support.launches import launches
from torch import Tensor

from ddpm_ext.integrations import accelerate

FACTOR, ULPS = 4, 4
MANY = 100  # the number of similar steps
NAMES = ("DDPM", "DDIM", "DDIMInverse", "EulerDiscrete", "EulerAncestralDiscrete")
SIGMA = NAMES[3:]  # the schedulers that have sigmas and count their steps
MODULES = {name: getattr(diffusers, f"{name}Scheduler").__module__ for name in (*NAMES, "DPMSolverMultistep")}
BY_SCHEDULE = {"scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}}  # Stable Diffusion's


def make(name: str, **config: Any) -> Any:
    """A scheduler of diffusers. `name` is the name of its class without "Scheduler"."""
    schedule = BY_SCHEDULE.get(config.get("beta_schedule", ""), {})
    return getattr(diffusers, f"{name}Scheduler")(**{**schedule, **config})


def prepared(name: str, steps: int | list[int] = 10, **config: Any) -> Any:
    """A scheduler after set_timesteps. steps: the number of timesteps, or a list of them."""
    scheduler = make(name, **config)
    scheduler.set_timesteps(**{"num_inference_steps" if isinstance(steps, int) else "timesteps": steps})
    return scheduler


def given(name: str, seed: int = 1) -> dict[str, Any]:
    """The arguments of the scheduler's step for a seeded generator, if the step takes a generator."""
    return {} if name == "DDIMInverse" else {"generator": seeded(seed)}


def module(name: str) -> Any:
    return importlib.import_module(MODULES[name])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------------ in float64


class Alphas(Tensor):
    """float64 alphas_cumprod, whose ratio, and 1 minus the ratio, are rounded to float32.

    diffusers computes beta from this ratio in float32. The tests count that rounding as part of the step's definition,
    and not as an error.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return result
        if name == "__getitem__":
            return result.as_subclass(Alphas)
        if name in ("__truediv__", "div") and all(isinstance(x, Alphas) for x in args):
            return result.float().double().as_subclass(Ratio)
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


class Ratio(Alphas):
    """The ratio of two Alphas."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("__rsub__", "rsub"):
            result = result.float().double()
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


class Doubled:
    """The module torch, with torch.float64 in place of torch.float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def exact(scheduler: Any) -> Any:
    """A copy of the scheduler whose float32 tables are float64."""
    in_double = copy.deepcopy(scheduler)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "one"):
        if name in vars(in_double):
            setattr(in_double, name, vars(in_double)[name].double().as_subclass(Alphas))
    if "sigmas" in vars(in_double):
        in_double.sigmas = in_double.sigmas.double()
    return in_double


@contextlib.contextmanager
def in_float64(name: str, drawn: torch.dtype) -> Iterator[None]:
    """A context in which the scheduler's module computes in float64, but draws its noise in the dtype `drawn`."""
    scheduler_module = module(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(scheduler_module, "torch", Doubled()))
        draw = getattr(scheduler_module, "randn_tensor", None)
        if draw is not None:

            def rounded(shape, generator=None, device=None, dtype=None, layout=None):
                return draw(shape, generator=generator, device=device, dtype=drawn).double()

            stack.enter_context(mock.patch.object(scheduler_module, "randn_tensor", rounded))
        yield


@contextlib.contextmanager
def draws(name: str) -> Iterator[list[torch.dtype]]:
    """A context that yields a list of the dtypes of the noise that the scheduler's module draws in it."""
    scheduler_module = module(name)
    dtypes: list[torch.dtype] = []
    draw = getattr(scheduler_module, "randn_tensor", None)

    def recorded(*args, **kwargs):
        noise = draw(*args, **kwargs)
        dtypes.append(noise.dtype)
        return noise

    with contextlib.ExitStack() as stack:
        if draw is not None:
            stack.enter_context(mock.patch.object(scheduler_module, "randn_tensor", recorded))
        yield dtypes


# --------------------------------------------------------------------------------------------------------- compared


def error(found: Tensor, truth: Tensor) -> float:
    """The largest difference of two elements. It is infinite if only one of the two is NaN."""
    found = found.double()
    apart = (found - truth).abs()
    apart[(found == truth) | (found.isnan() & truth.isnan())] = 0
    return apart.nan_to_num(nan=torch.inf).max().item() if apart.numel() else 0.0


def size(x: Tensor) -> float:
    """The largest finite absolute value."""
    finite = x[x.isfinite()].abs()
    return finite.max().item() if len(finite) else 0.0


def check(
    ours: tuple[Tensor, ...],
    theirs: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
    usual: Callable[[], tuple[list[float], list[float]]],
) -> None:
    """Checks the errors of our results by the bounds in this file's docstring.

    usual: returns diffusers' errors in many similar steps, and the sizes of the results without a clip. It is called
        only if the check without it fails. In this step, diffusers' rounding errors may cancel by chance, and a clip
        hides how large the rounded values were.
    """
    assert len(ours) == len(theirs) == len(truth)
    for i, (mine, other, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert mine.device == other.device
        if not true.numel():
            continue
        full = mine.dtype == torch.float32
        factor, ulps = (FACTOR, ULPS * torch.finfo(mine.dtype).eps) if full else (1, torch.finfo(mine.dtype).eps)
        found, off, largest = error(mine, true), error(other, true), size(true)
        if found > max(factor * off, ulps * largest):
            errors, sizes = usual()
            off, largest = max(off, errors[i]), max(largest, sizes[i])
        assert found <= max(factor * off, ulps * largest), (found, off, largest)


def shuffled(x: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """MANY times as many samples, with the numbers of x in random orders.

    The first `channels` channels are shuffled separately from the others.
    """
    parts = []
    for part in (x[:, :channels], x[:, channels:]):
        orders = [torch.randperm(part.numel(), generator=generator) for _ in range(MANY)]
        parts.append(torch.cat([part.flatten()[order].reshape(part.shape) for order in orders]))
    return torch.cat(parts, 1)


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Checks that results are equal."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def close(found: Tensor, expected: Tensor) -> None:
    """Checks that the results of two loops differ by at most 1e-4, relative to the largest value if that is above 1.

    Samples of schedulers with sigmas are as large as the largest sigma.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


def compare(name: str, plain: Any, m: Tensor, t: Any, x: Tensor, seed: int = 0, noise: Tensor | None = None, **options):
    """Takes a step with a copy of the scheduler `plain` and with an accelerated copy, and compares the results.

    Returns the accelerated scheduler, and whether it launched a fused operator. If it did not, its results must be
    equal to diffusers' results.
    """
    accelerated = accelerate(copy.deepcopy(plain))
    theirs = copy.deepcopy(plain)

    def step(scheduler, m, x, noise):
        given = dict(options)
        if noise is not None:
            given["variance_noise"] = noise
        elif name not in ("DDIMInverse",):
            given["generator"] = seeded(seed)
        result = scheduler.step(m, t, x, return_dict=False, **given)
        state = given["generator"].get_state() if "generator" in given else None
        return result, state

    with draws(name) as dtypes:
        expected, state = step(theirs, m, x, noise)
    drawn = dtypes[0] if dtypes else m.dtype
    with launches() as called, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs the own code")
        found, after = step(accelerated, m, x, noise)
    assert state is None or torch.equal(state, after)
    assert vars(theirs).get("_step_index") == vars(accelerated).get("_step_index")
    assert vars(theirs).get("lower_order_nums") == vars(accelerated).get("lower_order_nums")
    if called:

        def pair(plain, m, x, noise):
            """The results of diffusers' step in the dtypes of its inputs, and those in float64, the truth."""
            other, truth = copy.deepcopy(plain), exact(plain)
            result, _ = step(other, m, x, noise)
            with in_float64(name, drawn):
                true, _ = step(truth, *(y if y is None else y.double() for y in (m, x, noise)))
            return result, true

        def usual():
            many, generator = copy.deepcopy(plain), seeded(1)
            mixed = [y if y is None else shuffled(y, x.shape[1], generator) for y in (m, x, noise)]
            errors = [error(other, true) for other, true in zip(*pair(many, *mixed), strict=True)]
            many.config.clip_sample = many.config.thresholding = False
            return errors, [size(true) for true in pair(many, *mixed)[1]]

        check(found, *pair(plain, m, x, noise), usual)
    else:
        equal(found, expected)
    return accelerated, bool(called)


# ------------------------------------------------------------------------------------------------------------ loops


def model(x: Tensor, t: Any, channels: int | None = None) -> Tensor:
    """A model that is nonlinear in x and t. channels: of its output. Channels after those of x are for a variance."""
    m = torch.tanh(0.8 * x.float() + 0.1 * torch.sin(torch.as_tensor(t).float()) - 0.05)
    more = (channels or x.shape[1]) - x.shape[1]
    return torch.cat([m, 0.5 * m[:, :more].abs() + 0.1], 1).to(x.dtype) if more else m.to(x.dtype)


def loop(scheduler: Any, x: Tensor, channels: int | None = None, timesteps: Any = None, **options: Any) -> Tensor:
    """The last sample of a loop like those of diffusers' pipelines."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        m = model(scheduler.scale_model_input(x, t), t, channels)
        x = scheduler.step(m, t, x, **options, return_dict=False)[0]
    return x


class Elsewhere(Tensor):
    """A CPU tensor whose is_cpu is False. `reads` counts how often the host reads values of such tensors."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.is_cpu.__get__:
            return False
        name = getattr(function, "__name__", "")
        result = super().__torch_function__(function, types, args, kwargs)
        if name in ("item", "tolist", "__int__", "__index__", "__bool__", "__float__", "nonzero", "cpu", "numpy"):
            Elsewhere.reads += 1
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        return result
