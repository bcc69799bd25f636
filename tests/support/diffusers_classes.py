"""All scheduler classes of the installed diffusers, and loops with them like those of diffusers' pipelines."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import diffusers
import diffusers.schedulers
import torch
from torch import Tensor

from ddpm_ext.integrations import accelerated_class
from ddpm_ext.integrations.diffusers.traced import TracedScheduler
from ddpm_ext.integrations.diffusers.traced_classes import NOT_TRACED

SHAPE = (2, 3, 4, 5)
# Configurations of classes that cannot be created without arguments, or that pipelines create with these arguments.
CONFIGS = {
    "AmusedScheduler": {"mask_token_id": 5},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
# More arguments of set_timesteps.
ARGUMENTS = {
    "HeliosScheduler": {"stage_index": 0},
    "HeliosDMDScheduler": {"stage_index": 0},
    "SCMScheduler": {"intermediate_timesteps": None},
}
ENDS = ("DDPMWuerstchenScheduler", "SCMScheduler")  # the classes whose last timestep is the end of the last step


@functools.cache
def classes() -> dict[str, type]:
    """The scheduler classes that can be imported on this machine, by name."""
    by_name = {}
    package = diffusers.schedulers
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            continue  # it needs a library that is not installed
        for name, cls in vars(module).items():
            is_defined_here = inspect.isclass(cls) and cls.__module__ == module.__name__
            if is_defined_here and issubclass(cls, diffusers.SchedulerMixin) and cls is not diffusers.SchedulerMixin:
                by_name[name] = cls
    return dict(sorted(by_name.items()))


# ALONE: the names of diffusers' classes whose steps can't be traced, so that the accelerated classes always run
# diffusers' own code. TRACED: the names of the classes whose steps are traced.
ALONE = [name for name in classes() if name.removesuffix("Scheduler") in sum(NOT_TRACED.values(), ())]
TRACED = [n for n, cls in classes().items() if n not in ALONE and issubclass(accelerated_class(cls), TracedScheduler)]


def make(name: str, **config: Any) -> Any:
    return classes()[name](**CONFIGS.get(name, {}) | config)


def step_of(scheduler: Any) -> Any:
    """The method that takes a step."""
    return scheduler.step if hasattr(scheduler, "step") else scheduler.step_pred


def shape_of(scheduler: Any) -> tuple[int, ...]:
    """The shape of the samples in a loop. HeliosDMDScheduler takes videos."""
    return (*SHAPE, 2) if type(scheduler).__name__ == "HeliosDMDScheduler" else SHAPE


def set_timesteps(scheduler: Any, steps: int) -> list[Tensor]:
    """Calls set_timesteps, and returns the timesteps of the loop's steps.

    ConsistencyDecoderScheduler accepts only two steps.
    """
    name = type(scheduler).__name__
    scheduler.set_timesteps(2 if name == "ConsistencyDecoderScheduler" else steps, **ARGUMENTS.get(name, {}))
    timesteps = list(scheduler.timesteps)
    return timesteps[:-1] if name in ENDS else timesteps


def call_step(
    scheduler: Any, i: int, m: Tensor, x: Tensor, last: Any, noise: Any, *, vector: bool = False, **options: Any
) -> Any:
    """Takes step i of a loop, with the arguments that the class needs, and returns the step's result.

    Args:
        last: the results of step i - 1, a tuple. None in the first step.
        noise: a function that returns normal numbers with the shape of the samples.
        vector: whether the timestep has the shape (1,), and not ().
    """
    name, t = type(scheduler).__name__, scheduler.timesteps[i]
    t = t[None] if vector else t
    if name == "CogVideoXDPMScheduler":
        timestep_back = scheduler.timesteps[i - 1] if i else None
        return scheduler.step(m, last[1] if last else None, t, timestep_back, x, **options)
    if name == "HeliosDMDScheduler":
        options |= {"dmd_sigmas": scheduler.sigmas, "dmd_timesteps": scheduler.timesteps}
        options |= {"all_timesteps": scheduler.timesteps, "cur_sampling_step": i, "dmd_noisy_tensor": noise()}
    if name == "ScoreSdeVpScheduler":
        return scheduler.step_pred(m, x, t.expand(len(x)), **options)
    return step_of(scheduler)(m, t.expand(len(x)) if name == "DDPMWuerstchenScheduler" else t, x, **options)


def loop(
    scheduler: Any,
    steps: int,
    dtype: torch.dtype = torch.float32,
    *,
    output_dtype: torch.dtype | None = None,
    rounded: torch.dtype | None = None,
    return_dict: bool = True,
    start: int = 0,
    by_index: bool = True,
    vectors_from: int | None = None,
    edit: Callable[[int, Tensor], Tensor] = lambda i, x: x,
    **options: Any,
) -> tuple[list[tuple[Any, ...]], Tensor]:
    """Runs a loop with random model outputs. Returns the results of its steps and the generator's state after it.

    Args:
        dtype: the dtype of the samples.
        output_dtype: the dtype of the model outputs. With None, `dtype`.
        rounded: a dtype to which all normal numbers are rounded before they are converted to `dtype`. With None,
            `dtype`.
        start: the first step that the loop takes.
        by_index: whether the loop calls set_begin_index(start) for a start above 0. Otherwise the scheduler determines
            the start by the first timestep.
        vectors_from: the first step whose timestep has the shape (1,). With None, all timesteps have the shape ().
        edit: a function (i, the sample that step i returned) that returns the sample for step i + 1.
    """

    def normal() -> Tensor:
        return torch.randn(shape_of(scheduler), generator=generator).to(rounded or dtype).to(dtype)

    generator = torch.Generator().manual_seed(0)
    timesteps = set_timesteps(scheduler, steps)
    if start and by_index:
        scheduler.set_begin_index(start)
    parameters = inspect.signature(step_of(scheduler)).parameters
    if "generator" in parameters:
        options["generator"] = generator
    if "return_dict" in parameters:
        options["return_dict"] = return_dict
    x = normal()
    results: list[tuple[Any, ...]] = []
    for i in range(start, len(timesteps)):
        scaled = scheduler.scale_model_input(x, timesteps[i]) if hasattr(scheduler, "scale_model_input") else x
        m = (normal() - (scaled / 4).clamp(-1, 1)).to(output_dtype or dtype)
        last, vector = results[-1] if results else None, vectors_from is not None and i >= vectors_from
        result = call_step(scheduler, i, m, x, last, normal, vector=vector, **options)
        results.append(result if isinstance(result, tuple) else tuple(vars(result).values()))
        x = results[-1][0] if i + 1 == len(timesteps) else edit(i, results[-1][0])
    return results, generator.get_state()


def check(ours: Any, theirs: Any, bound: float) -> None:
    """Checks that two results of `loop` have the same dtypes and generator states, and nearly the same numbers.

    bound: the largest difference, relative to the largest number of a tensor.
    """
    (ours, our_state), (theirs, their_state) = ours, theirs
    assert torch.equal(our_state, their_state)
    for found, expected in zip(ours, theirs, strict=True):
        for x, y in zip(found, expected, strict=True):
            if not isinstance(y, torch.Tensor):
                assert x == y
            else:
                assert x.dtype == y.dtype
                assert (x.double() - y.double()).abs().max() <= bound * y.double().abs().max()
