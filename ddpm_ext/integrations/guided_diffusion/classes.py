"""The mixins for guided-diffusion's classes and for improved-diffusion's, whose methods have no cond_fn."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import with_fallback
from ddpm_ext.integrations.guided_diffusion.losses import training_losses
from ddpm_ext.integrations.guided_diffusion.peer import Function
from ddpm_ext.integrations.guided_diffusion.steps import SAMPLERS, STEPS, StepOptions, check_inputs, take_loop
from ddpm_ext.integrations.guided_diffusion.tables import tables_of
from ddpm_ext.integrations.shared import Accelerated, peer_method

__all__ = ["Guided", "Improved", "ImprovedSpaced", "Spaced"]

Step = dict[str, Tensor]
Parameters = dict[str, Any]  # names in their order, with their defaults

REQUIRED: Any = inspect.Parameter.empty
OPTIONS: Parameters = {"clip_denoised": True, "denoised_fn": None, "cond_fn": None, "model_kwargs": None}
STEP: Parameters = {"model": REQUIRED, "x": REQUIRED, "t": REQUIRED} | OPTIONS
LOOP: Parameters = {"model": REQUIRED, "shape": REQUIRED, "noise": None} | OPTIONS | {"device": None, "progress": False}
ETA: Parameters = {"eta": 0.0}


def _without_cond_fn(parameters: Parameters) -> Parameters:
    return {name: default for name, default in parameters.items() if name != "cond_fn"}


# The parameters of guided-diffusion's methods, but for self. Forks of its code may have others.
PARAMETERS: dict[str, Parameters] = {
    "q_sample": {"x_start": REQUIRED, "t": REQUIRED, "noise": None},
    "p_sample": STEP,
    "p_sample_loop": LOOP,
    "p_sample_loop_progressive": LOOP,
    "ddim_sample": STEP | ETA,
    "ddim_sample_loop": LOOP | ETA,
    "ddim_sample_loop_progressive": LOOP | ETA,
    "ddim_reverse_sample": _without_cond_fn(STEP) | ETA,
    "training_losses": {"model": REQUIRED, "x_start": REQUIRED, "t": REQUIRED, "model_kwargs": None, "noise": None},
}


class Guided(Accelerated):
    """Mixin placed before guided_diffusion.gaussian_diffusion.GaussianDiffusion in the bases.

    The steps and loops are made for each accelerated class, with the signatures of the peer's own methods.
    """

    library = "guided-diffusion"
    _peer_parameters: ClassVar[dict[str, Parameters]] = PARAMETERS
    replaces = tuple(PARAMETERS)
    relies_on: ClassVar[tuple[str, ...]] = (
        "p_mean_variance",
        "q_posterior_mean_variance",
        "condition_mean",
        "condition_score",
        "_predict_xstart_from_eps",
        "_predict_xstart_from_xprev",
        "_predict_eps_from_xstart",
        "_scale_timesteps",
        "_vb_terms_bpd",
    )

    num_timesteps: int
    loss_type: Any
    _vb_terms_bpd: Function

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises TypeError for a fork, which goes by the same names, whose methods take other arguments."""
        super().__init_subclass__(**kwargs)
        peer = cls.__dict__.get("_peer")
        if peer is None:
            return
        for name, parameters in cls._peer_parameters.items():
            # Where it is first defined: a subclass passes on (*args, **kwargs).
            own = next((vars(c)[name] for c in reversed(peer.__mro__) if name in vars(c)), None)
            found = {} if own is None else _parameters(own)
            expected = {"self": REQUIRED} | parameters
            if list(found.items()) != list(expected.items()):
                raise TypeError(
                    f"obj is a {peer.__module__}.{peer.__qualname__}, whose {name} takes ({', '.join(found)}), "
                    f"expected {cls.library}'s, ({', '.join(expected)}), with its defaults"
                )
            if own is not None and name not in vars(Guided):  # a step or a loop
                setattr(cls, name, _bound(own, parameters))

    @with_fallback()
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        tables = tables_of(self)
        check_inputs(tables, x_start, t, noise)
        rng = None if noise is not None else self.accelerated.next_forward(x_start.device)
        if noise is None and rng is None:
            noise = torch.randn_like(x_start)
        return ops.forward_process(x_start, tables.q_sample(x_start.device), t, noise=noise, rng=rng)

    @with_fallback()
    def training_losses(
        self,
        model: Function,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> Step:
        return training_losses(self, model, x_start, t, model_kwargs, noise)


def _parameters(function: Any) -> Parameters:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def _bound(own: Function, parameters: Parameters) -> Function:
    """The method that replaces the peer's `own`, a step or a loop, with the same signature."""
    method = own.__name__
    sampler = next(name for name in SAMPLERS if method.startswith(name))
    bind, take_step = _binder(parameters), STEPS[sampler]
    names, with_cond_fn = tuple(parameters), "cond_fn" in parameters

    def step(self: Any, model: Any, x: Any, t: Any, clip_denoised: Any, denoised_fn: Any, *rest: Any) -> Step:
        rest = rest if with_cond_fn else (None, *rest)
        return take_step(self, StepOptions(model, clip_denoised, denoised_fn, *rest), x, t)

    def progressive_loop(self: Any, *values: Any, with_x0: bool = True) -> Iterator[Step]:
        options = {"cond_fn": None} | dict(zip(names, values, strict=True))
        shape, noise, device, progress = (options.pop(name) for name in ("shape", "noise", "device", "progress"))
        return take_loop(self, sampler, StepOptions(**options), shape, noise, device, progress, with_x0)

    def loop(self: Any, *values: Any) -> Tensor:
        for found in progressive_loop(self, *values, with_x0=False):
            sample = found["sample"]
        return sample

    fused: Function = step
    if "shape" in parameters:
        fused = progressive_loop if method.endswith("_progressive") else loop

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = bind(args, kwargs)
        if values is None:
            return peer_method(self, method)(*args, **kwargs)  # which raises a TypeError
        return fused(self, *values)

    return call


def _binder(parameters: Parameters) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]:
    """A function of a call's arguments that gives the parameters' values in order, or None where they don't fit.

    It does what inspect.Signature.bind does, at a tenth of the cost.
    """
    items = list(parameters.items())
    defaults = tuple(parameters.values())
    after = [dict(items[count:]) for count in range(len(items) + 1)]  # the parameters after `count` positional ones
    required = defaults.count(REQUIRED)

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        count = len(args)
        if count > len(items):
            return None
        if not kwargs:
            return (*args, *defaults[count:]) if count >= required else None
        values = {**after[count], **kwargs}
        if len(values) > len(after[count]):  # unknown or repeated ones
            return None
        if count < required and any(value is REQUIRED for value in values.values()):
            return None
        return (*args, *values.values())

    return bind


class Improved(Guided):
    """Mixin placed before improved_diffusion.gaussian_diffusion.GaussianDiffusion in the bases."""

    library = "improved-diffusion"
    _peer_parameters: ClassVar[dict[str, Parameters]] = {
        name: _without_cond_fn(parameters) for name, parameters in PARAMETERS.items()
    }


class _Respaced(Guided):
    """A diffusion over some of the timesteps, whose models get those of the original one."""

    relies_on: ClassVar[tuple[str, ...]] = (*Guided.relies_on, "_wrap_model")


class Spaced(_Respaced):
    """Mixin placed before guided_diffusion.respace.SpacedDiffusion in the bases."""


class ImprovedSpaced(_Respaced, Improved):
    """Mixin placed before improved_diffusion.respace.SpacedDiffusion in the bases."""
