"""The rows of three schedulers of diffusers from their own levels, in closed form and without a trace.

So their first loop costs hardly more than any other: a trace takes longer than a loop of their own steps. As there, the
scheduler's own steps on random numbers prove the rows: here the first and the last one, of the first loop of each kind,
which are those of a class, its settings and a number of steps. What an expression does not cover is traced, and so is a
class whose methods are not diffusers' own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.shared import new
from ddpm_ext.tables.row_needs import RowNeeds
from ddpm_ext.tables.trace import TraceResult
from ddpm_ext.tables.trace_batch import ROUNDED, Array, flat, relative
from ddpm_ext.tables.trace_linear import columns_of
from ddpm_ext.tables.trace_run import Step, on_cpu, parts_of, step_of

METHODS = (
    "step", "scale_model_input", "index_for_timestep", "_init_step_index",
    "get_scalings_for_boundary_condition_discrete",
)  # fmt: skip
CACHED = 64  # kinds of loops
TRIED = 8  # random numbers in a proof
NONE: Any = object()  # a generator that nobody can draw by
WIDE = np.float64


class Uncovered(Exception):
    """An expression is not what a scheduler's steps do."""


class Factors(NamedTuple):
    """Of steps prev = x * sample + m * output + s * noise, float64 (steps,) each.

    Attributes:
        clean: (steps, 2), a and b of the second tensor, a sample + b output, that a step returns; None without one.
        noisy: (steps,), whether a step draws noise.
        scales: what each step's sample is multiplied by for the model, 1 for the first; None where it is not.
    """

    x: Array
    m: Array
    s: Array
    clean: Array | None
    noisy: list[bool]
    scales: Array | None = None


# Levels and products of levels are float32, as diffusers computes them, and what a step makes of a sample float64. So
# the rows have the bits of traced ones.


def _levels(x: Tensor) -> Array:
    if x.dtype is not torch.float32:
        raise Uncovered
    found: Array = x.numpy()
    return found


def _root(x: Array) -> Array:
    """By torch, as diffusers' own: numpy's last bit may be another."""
    return torch.from_numpy(x).sqrt().numpy()


@np.errstate(all="ignore")
def _euler(own: Any, first: int) -> Factors:
    """x + (x - x0) / sigma * (sigma' - sigma)"""
    sigmas = _levels(own.sigmas)[first:]
    sigma, dt = sigmas[:-1], (sigmas[1:] - sigmas[:-1]).astype(WIDE)
    zero, one, variance = np.zeros(len(dt)), np.ones(len(dt)), sigma**2 + 1
    root = _root(variance)
    a, b = {
        "epsilon": lambda: (one, -sigma),
        "v_prediction": lambda: (1 / variance.astype(WIDE), -sigma / root),
        "sample": lambda: (zero, one),
    }[own.config.prediction_type]()
    clean = np.stack([a, b], 1)
    scales = np.append(1.0, 1 / root[1:].astype(WIDE)) if len(dt) > 1 else None
    return Factors(1 + (1 - a) / sigma * dt, -b.astype(WIDE) / sigma * dt, zero, clean, [False] * len(dt), scales)


def _flow_match_euler(own: Any, first: int) -> Factors:
    """x + (sigma' - sigma) v"""
    if own.config.stochastic_sampling:
        raise Uncovered
    sigmas = _levels(own.sigmas)[first:]
    dt = (sigmas[1:] - sigmas[:-1]).astype(WIDE)
    zero = np.zeros(len(dt))
    return Factors(zero + 1, dt, zero, None, [False] * len(dt))


@np.errstate(all="ignore")
def _lcm(own: Any, first: int) -> Factors:
    """x0' = c_skip x + c_out x0, with noise again to the next level, but for the last step."""
    config = own.config
    if config.thresholding or config.clip_sample:
        raise Uncovered
    t, alphas = own.timesteps.numpy()[first:], _levels(own.alphas_cumprod)
    following = np.append(t[1:], t[-1])
    alpha = alphas[t]
    after = np.where(following >= 0, alphas[following], own.final_alpha_cumprod.numpy())
    signal, noise = _root(alpha).astype(WIDE), _root(1 - alpha).astype(WIDE)
    a, b = {
        "epsilon": lambda: (1 / signal, -noise / signal),
        "v_prediction": lambda: (signal, -noise),
        "sample": lambda: (0 * signal, 0 * signal + 1),
    }[config.prediction_type]()
    scaled = t.astype(np.float32) * np.float32(config.timestep_scaling)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / _root(scaled**2 + 0.25)
    a, b = c_out * a + c_skip, c_out * b
    noisy = np.arange(first, first + len(t)) != own.num_inference_steps - 1
    kept, added = np.where(noisy, _root(after), 1).astype(WIDE), np.where(noisy, _root(1 - after), 0).astype(WIDE)
    return Factors(kept * a, kept * b, added, np.stack([a, b], 1), noisy.tolist())


class Form(NamedTuple):
    """A class's expression.

    Attributes:
        factors: of an object and the place of a loop's first timestep.
        settings: of the config, on which it hangs what the expression is.
        reads: the attributes that it and the class's own steps read before they write them.
    """

    factors: Callable[[Any, int], Factors]
    settings: tuple[str, ...]
    reads: frozenset[str]


STEPS_READ = frozenset({"timesteps", "_internal_dict", "_step_index", "_begin_index"})
FORMS: Mapping[str, Form] = {
    "EulerDiscreteScheduler": Form(_euler, ("prediction_type",), STEPS_READ | {"sigmas"}),
    "FlowMatchEulerDiscreteScheduler": Form(_flow_match_euler, ("stochastic_sampling",), STEPS_READ | {"sigmas"}),
    "LCMScheduler": Form(
        _lcm,
        ("prediction_type", "thresholding", "clip_sample"),
        STEPS_READ | {"alphas_cumprod", "final_alpha_cumprod", "num_inference_steps"},
    ),
}


class Steps(NamedTuple):
    """What is the same for all levels: of a class with these methods and settings, and a loop of as many steps.

    Attributes:
        steps: what each does.
        dtypes: as TracedRows has them, of all such loops.
        needs: what the rows need.
    """

    steps: list[Step]
    dtypes: dict[Any, Any]
    needs: list[RowNeeds]


_steps: BoundedCache[Steps] = BoundedCache(CACHED)


def _own_methods(scheduler: Any) -> tuple[FunctionType, ...] | None:
    """Those of an object of diffusers' own class; None where one was replaced."""
    cls: Any = type(scheduler)
    if not cls.__module__.startswith("diffusers.schedulers."):
        return None
    file = sys.modules[cls.__module__].__file__
    found = tuple([vars(cls)[name] for name in METHODS if name in vars(cls)])
    is_own = all([type(method) is FunctionType and method.__code__.co_filename == file for method in found])
    return found if is_own and vars(scheduler).keys().isdisjoint(METHODS) else None


def closed(scheduler: Any, first: int, timesteps: list[Tensor], dims: int) -> tuple[TraceResult, Steps] | None:
    """What `follow` finds. None where it is to be traced.

    Args:
        scheduler: an object of diffusers' class, on the CPU, as a loop begins; it stays as it is.
        first: the place of the first of `timesteps` among its own, of which they are all that follow.
        dims: how many dimensions samples have.
    """
    form, methods = FORMS.get(type(scheduler).__name__), _own_methods(scheduler)
    if form is None or methods is None or torch.get_default_dtype() is not torch.float32:
        return None
    try:
        factors = form.factors(scheduler, first)
        _check(scheduler, first, len(timesteps), factors)
        settings = tuple([getattr(scheduler.config, name) for name in form.settings])
        key = form, methods, settings, first, tuple(factors.noisy), dims
        found = _steps.get_or_make(key, lambda: _tried(scheduler, form.reads, first, timesteps, factors, dims))
    except Exception:  # which a trace explains
        return None
    n, noise = len(timesteps), [0 if noisy else None for noisy in factors.noisy]
    clean = factors.clean
    columns = {"c1": factors.x, "c2": factors.m} if clean is None else columns_of(factors.x, factors.m, clean)
    times = scheduler.timesteps.numpy()[first:]
    columns |= {"s": factors.s, "timestep": times.astype(WIDE if times.dtype.kind == "f" else np.int64)}
    given: list[list[int]] = [[]] * n
    second, own = clean is not None, [0.0] * n
    trace = TraceResult(columns, None, ROUNDED, found.steps, noise, given, second, own, factors.scales, read=form.reads)
    return trace, found


def _check(scheduler: Any, first: int, n: int, factors: Factors) -> None:
    """Raises Uncovered for a loop that begins elsewhere, and for numbers that are no steps'."""
    begin = scheduler._begin_index if scheduler._step_index is None else scheduler._step_index  # noqa: SLF001
    if begin is None:
        times = scheduler.timesteps.numpy()
        begin = np.flatnonzero(times == times[first])[:2][-1]  # the second one, where an image is denoised from there
    numbers = [factors.x, factors.m, factors.s, *(() if factors.clean is None else factors.clean.T)]
    if begin != first or any(len(each) != n for each in numbers) or not np.isfinite(numbers).all():
        raise Uncovered


class Numbers(NamedTuple):
    """What a proof takes. Nobody may write to it.

    Attributes:
        x, m: samples and outputs of one number each.
        inputs: (3, TRIED), these and the noise that a generator with the seed 0 draws first.
        following: what it draws then.
    """

    x: Tensor
    m: Tensor
    inputs: Array
    following: float

    @staticmethod
    @functools.cache
    def of(dims: int) -> Numbers:
        generator = torch.Generator().manual_seed(1)
        shape = TRIED, *[1] * (dims - 1)
        x, m = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
        z = torch.randn(shape, generator=generator.manual_seed(0), device="cpu")
        return Numbers(
            x, m, np.array([flat(y) for y in (x, m, z)]), torch.rand((), generator=generator, device="cpu").item()
        )


def _tried(
    scheduler: Any, reads: Iterable[str], first: int, timesteps: list[Tensor], factors: Factors, dims: int
) -> Steps:
    """What the steps do beside their factors, once the first one and the last one have shown that these are theirs.
    Raises Uncovered where they are not.

    reads: the attributes that own steps may read.
    """
    n, scales = len(timesteps), factors.scales
    own = new(type(scheduler))
    own.__dict__.update({name: vars(scheduler)[name] for name in reads})
    with on_cpu():
        x, m, inputs, following = Numbers.of(dims)
        scale = getattr(own, "scale_model_input", None)
        steps: list[Step] = []
        found, weights = [], []
        for i, options in ((0, {}), (n - 1, {"return_dict": False})):
            if steps:
                own._step_index = first + i
            scaled = x if scale is None else scale(x, timesteps[i])
            before, noisy = vars(own).copy(), factors.noisy[i]
            generator = torch.Generator().manual_seed(0) if noisy else None
            returned = own.step(m, timesteps[i], x, generator=generator or NONE, **options)
            result, prev, second = parts_of(returned)
            step = step_of(own, result, m, before, [torch.float32] * noisy, 0, {})
            if step.state.get("_step_index") != first + i + 1 or step.stores or step.tensors:
                raise Uncovered
            if (steps and len(step.state) > 1) or (second is None) != (factors.clean is None):
                raise Uncovered
            if generator is not None and torch.rand((), generator=generator, device="cpu").item() != following:
                raise Uncovered
            steps.append(step)
            found.append(prev)
            weights.append((factors.x[i], factors.m[i], factors.s[i]))
            if second is not None and factors.clean is not None:
                found.append(second)
                weights.append((*factors.clean[i], 0.0))
            if scales is not None and i:
                found.append(scaled)
                weights.append((scales[i], 0.0, 0.0))
            elif scales is None and n > 1 and scaled is not x:
                raise Uncovered
        results, sums = torch.stack(found).double().numpy().reshape(-1, TRIED), np.array(weights)
    if not (relative(np.abs(results - sums @ inputs), np.abs(sums) @ np.abs(inputs)) <= ROUNDED).all():
        raise Uncovered
    draws: dict[bool, list[torch.dtype]] = {False: [], True: [torch.float32]}
    others = [
        Step(steps[0].result, draws[noisy], {"_step_index": first + 2 + i}, scaling={})
        for i, noisy in enumerate(factors.noisy[1:])
    ]
    needs = [RowNeeds(calls_model=True, guided=False, needs_output=True, noisy=noisy) for noisy in (False, True)]
    return Steps([steps[0], *others], {}, [needs[noisy] for noisy in factors.noisy])
