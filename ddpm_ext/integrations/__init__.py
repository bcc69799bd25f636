"""Other libraries' diffusion objects, taken over: the same class, the same results, one launch a step.

`python -m ddpm_ext.integrations` prints what is fused, class by class.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ddpm_ext.integrations.registry import Support
from ddpm_ext.integrations.shared import Acceleration, make_class, new

__all__ = ["Acceleration", "Support", "accelerate", "accelerated_class", "support_table"]

T = TypeVar("T")


class _Known(NamedTuple):
    """Where a peer's class is, by its module and name, and the mixin for it, by ours."""

    module: str
    name: str
    ours: str
    mixin: str


def _diffusers(module: str, name: str, ours: str, mixin: str) -> _Known:
    return _Known(f"diffusers.schedulers.{module}", name, f"diffusers.{ours}", mixin)


KNOWN = (
    _diffusers("scheduling_ddpm", "DDPMScheduler", "ddpm", "DDPM"),
    _diffusers("scheduling_ddim", "DDIMScheduler", "ddim", "DDIM"),
    _diffusers("scheduling_ddim_inverse", "DDIMInverseScheduler", "ddim", "DDIMInverse"),
    _diffusers("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", "dpm_solver", "DPMSolverMultistep"),
    _diffusers("scheduling_euler_discrete", "EulerDiscreteScheduler", "euler", "EulerDiscrete"),
    _diffusers(
        "scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", "euler", "EulerAncestralDiscrete"
    ),
    *(
        _Known(f"{library}.{module}", name, "guided_diffusion", mixin)
        for library, module, name, mixin in (
            ("guided_diffusion", "gaussian_diffusion", "GaussianDiffusion", "Guided"),
            ("guided_diffusion", "respace", "SpacedDiffusion", "Spaced"),
            ("improved_diffusion", "gaussian_diffusion", "GaussianDiffusion", "Improved"),
            ("improved_diffusion", "respace", "SpacedDiffusion", "ImprovedSpaced"),
        )
    ),
    _Known(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
        "GaussianDiffusion",
        "denoising_diffusion_pytorch",
        "Denoising",
    ),
)


def _ours(name: str) -> Any:
    return importlib.import_module(f"ddpm_ext.integrations.{name}")


def support_table() -> list[Support]:
    """What is fused of which class, method by method."""
    modules = dict.fromkeys([*(known.ours for known in KNOWN), "tutorial"])
    return [row for module in modules for row in _ours(module).SUPPORT]


def accelerated_class(peer: type) -> type:
    """The subclass of a peer's class whose objects are accelerated; a diffusers scheduler can be made by it directly.

    Raises:
        TypeError: not one of the classes that are known, or a subclass that changes what is replaced.
    """
    peer = getattr(peer, "_peer", peer)
    for ancestor in peer.__mro__:
        for known in KNOWN:
            if (ancestor.__module__, ancestor.__name__) == known[:2]:
                return make_class(getattr(_ours(known.ours), known.mixin), peer, ancestor)
    tutorial = _ours("tutorial")
    if tutorial.resembles(peer):
        return make_class(tutorial.Tutorial, peer, peer)
    raise TypeError(f"obj is a {peer.__module__}.{peer.__qualname__}, expected {_taken()}")


def _taken() -> str:
    by_library: dict[str, list[str]] = {}
    for known in KNOWN:
        by_library.setdefault(known.module.partition(".")[0], []).append(known.name)
    names = "; ".join(f"{library}'s {', '.join(names)}" for library, names in by_library.items())
    return f"{names}; a pipeline of diffusers; or a class with the tutorial's p_sample, q_sample and tables"


def accelerate(obj: T, *, noise: str = "torch", seed: int | None = None, sample_ids: int | Tensor = 0) -> T:
    """The same object, with each step in one launch: of a subclass of its class, sharing its model and parameters; the
    given one stays as it was.

    What has no fused form runs the library's own code; a warning says why, once a reason, and `.accelerated.fallbacks`
    keeps it.

    Args:
        obj: a scheduler or a pipeline of diffusers, a diffusion of guided-diffusion, improved-diffusion or
            denoising-diffusion-pytorch, or the tutorial's.
        noise: "torch": the library's own draws, by the same generators in the same order, so the same images as before,
            to float32 rounding. "philox": noise made in the launch, of the noise contract, which depends on (seed,
            sample id, timestep) alone; no generator is touched by a step then.
        seed: of "philox", 0 <= seed < 2^64; None: one from torch's default CPU generator.
        sample_ids: of "philox": the first sample's id, or an int64 tensor of shape (batch,).

    Returns:
        The accelerated object; its `accelerated` tells the settings, of which `rng` may be set anew.

    Raises:
        TypeError: an object of another kind, or of a subclass that changes what is replaced.
        ValueError: an argument out of range, or a seed or sample_ids beside noise "torch".
    """
    settings = Acceleration.of(noise, seed, sample_ids)
    scheduler = getattr(obj, "scheduler", None)
    if scheduler is not None and callable(getattr(obj, "register_modules", None)):
        pipeline = copy.copy(obj)
        pipeline.register_modules(scheduler=_accelerated(scheduler, settings))  # type: ignore[attr-defined]
        return pipeline
    return _accelerated(obj, settings)


def _accelerated(obj: Any, settings: Acceleration) -> Any:
    made = accelerated_class(type(obj))
    for name in (*made.replaces, *made.relies_on):  # type: ignore[attr-defined]
        if name in vars(obj):
            raise TypeError(f"obj has a {name} of its own, expected its class's")
    accelerated = new(made)
    for name, value in vars(obj).items():  # what it keeps in containers, it writes to; tensors and arrays it replaces
        accelerated.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    accelerated.__dict__["_acceleration"] = settings
    accelerated.__dict__.pop("_plans", None)
    accelerated._check()
    return accelerated
