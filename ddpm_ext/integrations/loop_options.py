"""Lets other libraries' loops take options of GaussianDiffusion.p_sample_loop. With such options, p_sample_loop runs
in place of the library's loop.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.peer_diffusion import PeerDiffusion
from ddpm_ext.integrations.peer_tables import TABLES
from ddpm_ext.integrations.shared import new, peer_method
from ddpm_ext.loop.options import SampleKeywords
from ddpm_ext.tables.levels import betas_between

Method = TypeVar("Method", bound=Callable[..., Any])
LOOP_OPTIONS = frozenset({"record", *SampleKeywords.__annotations__})


class LoopOptionsTaker(PeerDiffusion):
    """The base of mixins for objects whose tables are tensors, and whose loops and `sample` take options of
    p_sample_loop.

    Attributes:
        sample_calls: the methods with a whole loop, one of which the library's `sample` calls.
    """

    sample_calls: tuple[str, ...] = ("p_sample_loop",)
    model: Callable[..., Tensor]  # of objects whose loops have no argument `model`

    def _prediction(self) -> str:
        """ddpm_ext's name of the model's prediction. Raises Fallback if there is none."""
        raise NotImplementedError

    def _diffusion(self) -> GaussianDiffusion:
        """A GaussianDiffusion with the object's levels and variance. Raises Fallback if no valid betas give them."""
        prediction, tables = self._prediction(), {name: getattr(self, name) for name in TABLES}

        def make() -> GaussianDiffusion:
            names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_log_variance_clipped")
            signal, noise, log_variance = (tables[name].detach().to("cpu", torch.float64) for name in names)
            betas = betas_between((signal, noise))
            is_large = torch.allclose(log_variance[1:].exp(), betas[1:], rtol=1e-2)
            variance = "fixed_large" if is_large else "fixed_small"
            try:
                return GaussianDiffusion(len(betas), betas, prediction=prediction, variance=variance)
            except ValueError as error:
                raise Fallback(str(error)) from None

        return self._cached_by_state((GaussianDiffusion, prediction, *tables.values()), make)

    def _default_options(self, method: str, loop_options: Mapping[str, Any]) -> dict[str, Any]:
        """The options for ddpm_ext's p_sample_loop that follow from the object's settings.

        They apply when p_sample_loop runs in place of the library's `method`.

        Args:
            method: the name of the library's method that was called.
            loop_options: the options of p_sample_loop in the call. They override the returned ones. Defaults that would
                conflict with them are left out.
        """
        return {}

    def _finish(self, images: Any) -> Any:
        """Converts the images of ddpm_ext's loop to what the library's loops return."""
        return images

    def sample(self, *args: Any, **options: Any) -> Any:
        """Runs the library's `sample`. If the call has options of p_sample_loop, ddpm_ext's loop replaces its loop."""
        peers_method = peer_method(self, "sample")
        peers_options, loop_options = _split(peers_method, options)
        if not loop_options:
            return peers_method(*args, **options)
        has_run = False

        def loop(name: str, /, *args: Any, **options: Any) -> Any:
            nonlocal has_run
            has_run = True
            return getattr(self, name)(*args, **(options | loop_options))

        clone = new(type(self))
        clone.__dict__.update(self.__dict__, **{name: functools.partial(loop, name) for name in self.sample_calls})
        images = peer_method(clone, "sample")(*args, **peers_options)
        if not has_run:
            loops = " or ".join(self.sample_calls)
            raise TypeError(f"sample of {self.library} has no {sorted(loop_options)[0]}: it does not call {loops}")
        return images

    def _run_loop(
        self, peers_method: Any, args: tuple[Any, ...], peers_options: dict[str, Any], loop_options: dict[str, Any]
    ) -> Any:
        """Runs GaussianDiffusion.p_sample_loop in place of the library's method.

        Args:
            peers_method: the library's method.
            args, peers_options: the call's arguments for the library's method.
            loop_options: the call's options of p_sample_loop.
        """
        signature = inspect.signature(peers_method)
        arguments = signature.bind(*args, **peers_options).arguments
        model, shape = arguments.pop("model", getattr(self, "model", None)), tuple(arguments.pop("shape"))
        for name, value in arguments.items():
            if name in LOOP_OPTIONS:
                loop_options[name] = value
            elif value is not signature.parameters[name].default:
                raise TypeError(
                    f"{name} is {value!r} with {sorted(loop_options)[0]}, expected only options of p_sample_loop"
                )
        try:
            diffusion = self._diffusion()
        except Fallback as fallback:
            raise ValueError(
                f"{sorted(loop_options)[0]} is given, but no loop can be made: {fallback.reason}"
            ) from None
        options = self._default_options(peers_method.__name__, loop_options) | loop_options
        if options.get("rng") is None:
            options["rng"] = self.accelerated.whole_loop(shape[0])
        return self._finish(diffusion.p_sample_loop(model, shape, **options))


def takes_loop_options(method: Method) -> Method:
    """Decorator of a LoopOptionsTaker's method that is a whole loop.

    If a call has an option of p_sample_loop that the library's method doesn't have, ddpm_ext's loop runs instead.
    """

    @functools.wraps(method)
    def call(self: LoopOptionsTaker, *args: Any, **options: Any) -> Any:
        peers_method = peer_method(self, method.__name__)
        peers_options, loop_options = _split(peers_method, options)
        return (
            self._run_loop(peers_method, args, peers_options, loop_options)
            if loop_options
            else method(self, *args, **options)
        )

    return call  # type: ignore[return-value]


def _split(peers_method: Callable[..., Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into the options of the library's method and the options of p_sample_loop.

    If the library's method has **kwargs, it gets all options.
    """
    parameters = inspect.signature(peers_method).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    loop_options = {
        name: options[name] for name in options.keys() & LOOP_OPTIONS if name not in parameters and not takes_any
    }
    return {name: value for name, value in options.items() if name not in loop_options}, loop_options
