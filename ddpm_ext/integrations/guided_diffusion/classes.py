"""The mixins for the classes of guided-diffusion and improved-diffusion. improved-diffusion has no cond_fn."""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback, returning, with_fallback
from ddpm_ext.integrations.guided_diffusion.steps import STEPS, check_inputs, split_output, take_loop
from ddpm_ext.integrations.guided_diffusion.tables import tables_of, timesteps_for
from ddpm_ext.integrations.peer_diffusion import PeerDiffusion
from ddpm_ext.integrations.shared import peer_method, signature_text
from ddpm_ext.integrations.tensors import noise_itself, wants_gradient

OPTIONS = "clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None"
STEP = f"model, x, t, {OPTIONS}"
LOOP = f"model, shape, noise=None, {OPTIONS}, device=None, progress=False"


def _without_cond_fn(parameters: str) -> str:
    return parameters.replace(" cond_fn=None,", "")


# {method of guided-diffusion: its parameters without self}. A fork of the library with other parameters is rejected.
PARAMETERS = {
    "q_sample": "x_start, t, noise=None",
    "p_sample": STEP,
    "p_sample_loop": LOOP,
    "p_sample_loop_progressive": LOOP,
    "ddim_sample": f"{STEP}, eta=0.0",
    "ddim_sample_loop": f"{LOOP}, eta=0.0",
    "ddim_sample_loop_progressive": f"{LOOP}, eta=0.0",
    "ddim_reverse_sample": _without_cond_fn(f"{STEP}, eta=0.0"),
    "training_losses": "model, x_start, t, model_kwargs=None, noise=None",
}


class Guided(PeerDiffusion):
    """The mixin for guided_diffusion.gaussian_diffusion.GaussianDiffusion.

    An accelerated class derives from this mixin and, after it, from the library's class. __init_subclass__ adds the
    steps and loops to the accelerated class, with the signatures of the library's methods.
    """

    library = "guided-diffusion"
    _peer_parameters: ClassVar[dict[str, str]] = PARAMETERS
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds the steps and loops. Raises TypeError for a fork of the library whose methods differ from PARAMETERS."""
        super().__init_subclass__(**kwargs)
        peer_class = cls.__dict__.get("_peer")
        if peer_class is None:
            return
        for name, parameters in cls._peer_parameters.items():
            # The base-most definition is checked, since an override, as in SpacedDiffusion, may take (*args, **kwargs).
            method = next((vars(c)[name] for c in reversed(peer_class.__mro__) if name in vars(c)), None)
            actual = "()" if method is None else signature_text(method)
            expected = f"(self, {parameters})"
            if actual != expected:
                raise TypeError(
                    f"obj is a {peer_class.__module__}.{peer_class.__qualname__}, whose {name} takes {actual}, "
                    f"expected {cls.library}'s, {expected}"
                )
            if method is not None and name not in vars(Guided):  # a step or a loop
                setattr(cls, name, _fused(method))

    @with_fallback()
    def q_sample(self: Any, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        tables = tables_of(self)
        check_inputs(tables, x_start, t, noise)
        source = self._training_noise(x_start, noise)
        return ops.forward_process(x_start, tables.get("q_sample", x_start.device), t, **source)

    @with_fallback()
    def training_losses(
        self: Any,
        model: Callable[..., Any],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        tables, device = tables_of(self), x_start.device
        check_inputs(tables, x_start, t, noise)
        if tables.bound_factor is None or x_start.dim() < 2:
            raise Fallback
        if wants_gradient(x_start, noise):
            raise Fallback("a gradient is asked for by x_start or noise")

        with_bound = tables.learned or not tables.with_error
        # For samples at t = 0, the library's code computes the bound's term, with its own approximation of the normal
        # CDF. To find these samples, the host waits for a GPU once; the library's code waits at each of its tables.
        indices_at_zero = (t == 0).nonzero()[:, 0] if with_bound else t
        source = self._training_noise(x_start, noise)
        x_t = ops.forward_process(x_start, tables.get("q_sample", device), t, **source)
        output = model(x_t, timesteps_for(self, tables, model, t), **(model_kwargs or {}))

        def peers_losses() -> Any:
            losses = peer_method(self, "training_losses")
            return losses(returning(output), x_start, t, model_kwargs, noise_itself(source, x_start))

        prediction, _ = split_output(tables, x_start, output, peers_losses)
        terms: dict[str, Tensor] = {}
        if with_bound:
            options: dict[str, Any] = {"reduction": "none", "variational": True, "detach_mean": tables.with_error}
            vb = ops.diffusion_loss(output, x_start, tables.get("bound", device), t, **options, **source)
            if len(indices_at_zero) > 0:
                output_at_zero = output[indices_at_zero]
                if tables.with_error:  # the bound trains the variance alone
                    channels = x_start.shape[1]
                    output_at_zero = torch.cat([output_at_zero[:, :channels].detach(), output_at_zero[:, channels:]], 1)
                inputs = (x_start[indices_at_zero], x_t[indices_at_zero], t[indices_at_zero])
                terms_at_zero = self._vb_terms_bpd(returning(output_at_zero), *inputs, clip_denoised=False)["output"]
                vb = vb.index_add(0, indices_at_zero, (terms_at_zero * tables.bound_factor).to(vb.dtype))
            terms["vb"] = vb
        if not tables.with_error:
            return {"loss": terms["vb"]}
        target = None if tables.prediction == "eps" else x_start
        terms["mse"] = ops.diffusion_loss(
            prediction, target, tables.get("error", device), t, reduction="none", **source
        )
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms


def _fused(peers_method: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of the library's method, a step or a loop, with the same signature."""
    method = peers_method.__name__
    name_of_step = next(name for name in STEPS if method.startswith(name))
    take_step, (_, *parameters) = STEPS[name_of_step], inspect.signature(peers_method).parameters.values()
    # A named tuple binds a call's arguments as a function does, at a tenth of the cost of inspect.Signature.bind.
    defaults = [parameter.default for parameter in parameters if parameter.default is not parameter.empty]
    bind: Any = namedtuple("bind", [parameter.name for parameter in parameters], defaults=defaults)  # type: ignore[misc]

    is_loop, progressive = "loop" in method, method.endswith("_progressive")

    @functools.wraps(peers_method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments: Any = bind(*args, **kwargs)
        except TypeError:
            arguments = None
        if arguments is None:
            return peer_method(self, method)(*args, **kwargs)  # raises a TypeError that names the library's method
        if not is_loop:
            return take_step(self, arguments, arguments.x, arguments.t)
        foreign = self._foreign_method()
        if foreign is not None:
            if not self.accelerated.trace:  # with trace=True the steps are proven one by one
                self.accelerated.record_fallback(self.library, method, self._refusal(foreign))
            return peer_method(self, method)(*args, **kwargs)
        steps = take_loop(self, name_of_step, arguments, with_x0=progressive)
        if progressive:
            return steps
        for step in steps:
            sample = step["sample"]
        return sample

    return call


class Improved(Guided):
    """The mixin for improved_diffusion.gaussian_diffusion.GaussianDiffusion, whose methods have no cond_fn."""

    library = "improved-diffusion"
    _peer_parameters: ClassVar[dict[str, str]] = {
        name: _without_cond_fn(parameters) for name, parameters in PARAMETERS.items()
    }


class Spaced(Guided):
    """The mixin for guided_diffusion.respace.SpacedDiffusion.

    A SpacedDiffusion takes some of the timesteps of an original diffusion. Its models get the original timesteps.
    """

    relies_on = (*Guided.relies_on, "_wrap_model")


class ImprovedSpaced(Spaced, Improved):
    """The mixin for improved_diffusion.respace.SpacedDiffusion."""
