"""The mixins: guided-diffusion's methods, and improved-diffusion's, which know no cond_fn."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.guided_diffusion.losses import training_losses
from ddpm_ext.integrations.guided_diffusion.plan import Plan, plan_of
from ddpm_ext.integrations.guided_diffusion.steps import Asked, Function, take, walk, why_not
from ddpm_ext.integrations.shared import Accelerated

__all__ = ["Guided", "Improved", "ImprovedSpaced", "Spaced"]

Kwargs = dict[str, Any] | None
Step = dict[str, Tensor]


def _parameters(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


class Guided(Accelerated):
    """Of guided_diffusion.gaussian_diffusion.GaussianDiffusion. Arguments and results: as its methods'."""

    library = "guided-diffusion"
    replaces = (
        "q_sample",
        "p_sample",
        "p_sample_loop",
        "p_sample_loop_progressive",
        "ddim_sample",
        "ddim_sample_loop",
        "ddim_sample_loop_progressive",
        "ddim_reverse_sample",
        "training_losses",
    )
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
    _spaced = False

    num_timesteps: int
    loss_type: Any
    _vb_terms_bpd: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Forks of this code go by the same names: TypeError for one whose methods take other arguments."""
        super().__init_subclass__(**kwargs)
        peer = cls.__dict__.get("_peer")
        if peer is None:
            return
        for name in cls.replaces:
            # where it is first defined: what a subclass passes on is (*args, **kwargs)
            theirs = next((vars(c)[name] for c in reversed(peer.__mro__) if name in vars(c)), None)
            expected, found = _parameters(getattr(cls, name)), [] if theirs is None else _parameters(theirs)
            if found != expected:
                raise TypeError(
                    f"obj is a {peer.__module__}.{peer.__qualname__}, whose {name} takes "
                    f"({', '.join(n for n, _ in found)}), expected {cls.library}'s, "
                    f"({', '.join(n for n, _ in expected)}), with its defaults"
                )

    def _own(self, method: str) -> Function:
        """The peer's own."""
        return getattr(super(), method)

    @property
    def _plan(self) -> Plan:
        return plan_of(self, self._spaced)

    def _maps(self, model: Function) -> bool:
        """Whether a model maps timesteps by itself, so that it is told them as they are."""
        return False

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        why = why_not(self._plan, x_start, t, noise)
        if why is not None:
            self._aside("q_sample", why or None)
            return self._own("q_sample")(x_start, t, noise)
        rng = None if noise is not None else self.accelerated.next_forward()
        if noise is None and rng is None:
            noise = torch.randn_like(x_start)
        return ops.forward_process(x_start, self._plan.q_sample(x_start.device), t, noise=noise, rng=rng)

    def training_losses(
        self, model: Function, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> Step:
        return training_losses(self, model, x_start, t, model_kwargs, noise)

    def p_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: Kwargs = None,
    ) -> Step:
        return take(self, "p_sample", Asked(model, clip_denoised, denoised_fn, cond_fn, model_kwargs), x, t)

    def ddim_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Step:
        return take(self, "ddim_sample", Asked(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta), x, t)

    def ddim_reverse_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Step:
        return take(
            self, "ddim_reverse_sample", Asked(model, clip_denoised, denoised_fn, None, model_kwargs, eta), x, t
        )

    def p_sample_loop(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        asked = Asked(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return _last(walk(self, "p_sample", asked, shape, noise, device, progress, hand_out=False))

    def p_sample_loop_progressive(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[Step]:
        asked = Asked(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return walk(self, "p_sample", asked, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        asked = Asked(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        return _last(walk(self, "ddim_sample", asked, shape, noise, device, progress, hand_out=False))

    def ddim_sample_loop_progressive(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Step]:
        asked = Asked(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        return walk(self, "ddim_sample", asked, shape, noise, device, progress)


def _last(steps: Iterator[Step]) -> Tensor:
    for step in steps:
        last = step["sample"]
    return last


class Improved(Guided):
    """Of improved_diffusion.gaussian_diffusion.GaussianDiffusion, whose steps know no cond_fn."""

    library = "improved-diffusion"

    def p_sample(  # type: ignore[override]
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
    ) -> Step:
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

    def ddim_sample(  # type: ignore[override]
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Step:
        return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        more = (model_kwargs, device, progress)
        return super().p_sample_loop(model, shape, noise, clip_denoised, denoised_fn, None, *more)

    def p_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[Step]:
        more = (model_kwargs, device, progress)
        return super().p_sample_loop_progressive(model, shape, noise, clip_denoised, denoised_fn, None, *more)

    def ddim_sample_loop(  # type: ignore[override]
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        more = (model_kwargs, device, progress, eta)
        return super().ddim_sample_loop(model, shape, noise, clip_denoised, denoised_fn, None, *more)

    def ddim_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Kwargs = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Step]:
        more = (model_kwargs, device, progress, eta)
        return super().ddim_sample_loop_progressive(model, shape, noise, clip_denoised, denoised_fn, None, *more)


class _Respaced(Guided):
    """A diffusion over some of the timesteps, whose models are told those of the original."""

    relies_on: ClassVar[tuple[str, ...]] = (*Guided.relies_on, "_wrap_model")
    _spaced = True
    _wrap_model: Any

    def _maps(self, model: Function) -> bool:
        return self._wrap_model(model) is model


class Spaced(_Respaced):
    """Of guided_diffusion.respace.SpacedDiffusion."""


class ImprovedSpaced(_Respaced, Improved):
    """Of improved_diffusion.respace.SpacedDiffusion."""
