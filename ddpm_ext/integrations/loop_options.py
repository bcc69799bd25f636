"""Our sampling loop in place of an object's own: its methods take p_sample_loop's options beside their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.own_tables import TABLES
from ddpm_ext.integrations.peer_diffusion import PeerDiffusion
from ddpm_ext.integrations.shared import new, peer_method
from ddpm_ext.loop.options import SampleKeywords
from ddpm_ext.tables.levels import betas_between

Method = TypeVar("Method", bound=Callable[..., Any])
LOOP_OPTIONS = frozenset({"record", *SampleKeywords.__annotations__})


class LoopOptionsTaker(PeerDiffusion):
    """The base of mixins for objects whose tables are tensors, and whose loops and `sample` take the options.

    Attributes:
        sample_calls: the methods of whole loops, of which the peer's `sample` calls one.
    """

    sample_calls: tuple[str, ...] = ("p_sample_loop",)
    model: Callable[..., Tensor]  # of a peer whose loops don't get it as an argument

    def _prediction(self) -> str:
        """Our name of what its model predicts. Raises Fallback where there is none."""
        raise NotImplementedError

    def _diffusion(self) -> GaussianDiffusion:
        """Ours with the object's levels, and its variance where that is "fixed_large". Raises Fallback where its tables
        are no levels of betas."""
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

        return self._of_state((GaussianDiffusion, prediction, *tables.values()), make)

    def _own_options(self, method: str, ours: Mapping[str, Any]) -> dict[str, Any]:
        """The object's settings, as options that a call of the method need not give beside the given ones."""
        return {}

    def _finish(self, images: Any) -> Any:
        """The images of our loop as the peer's loops return them."""
        return images

    def sample(self, *args: Any, **options: Any) -> Any:
        """The peer's own method; with p_sample_loop's options, the loop that it calls is ours."""
        own = peer_method(self, "sample")
        given, ours = _split(own, options)
        if not ours:
            return own(*args, **options)
        is_taken = False

        def loop(name: str, /, *args: Any, **options: Any) -> Any:
            nonlocal is_taken
            is_taken = True
            return getattr(self, name)(*args, **(options | ours))

        view = new(type(self))
        view.__dict__.update(self.__dict__, **{name: functools.partial(loop, name) for name in self.sample_calls})
        images = peer_method(view, "sample")(*args, **given)
        if not is_taken:
            loops = " or ".join(self.sample_calls)
            raise TypeError(f"sample of {self.library} has no {sorted(ours)[0]}: it does not call {loops}")
        return images

    def _run_loop(self, own: Any, args: tuple[Any, ...], given: dict[str, Any], ours: dict[str, Any]) -> Any:
        """p_sample_loop of ours for a call of the peer's own method with these arguments."""
        signature = inspect.signature(own)
        arguments = signature.bind(*args, **given).arguments
        model, shape = arguments.pop("model", getattr(self, "model", None)), tuple(arguments.pop("shape"))
        for name, value in arguments.items():
            if name in LOOP_OPTIONS:
                ours[name] = value
            elif value is not signature.parameters[name].default:
                raise TypeError(
                    f"{name} is {value!r} beside {sorted(ours)[0]}, expected options of p_sample_loop alone"
                )
        try:
            diffusion = self._diffusion()
        except Fallback as fallback:
            raise ValueError(f"{sorted(ours)[0]} is given, but no loop can be made: {fallback.reason}") from None
        options = self._own_options(own.__name__, ours) | ours
        if options.get("rng") is None:
            options["rng"] = self.accelerated.whole_loop(shape[0])
        return self._finish(diffusion.p_sample_loop(model, shape, **options))


def takes_loop_options(method: Method) -> Method:
    """Decorates a LoopOptionsTaker's method of a whole loop, so that our loop runs where one of its options is given
    that the peer's own method doesn't have."""

    @functools.wraps(method)
    def call(self: LoopOptionsTaker, *args: Any, **options: Any) -> Any:
        own = peer_method(self, method.__name__)
        given, ours = _split(own, options)
        return self._run_loop(own, args, given, ours) if ours else method(self, *args, **options)

    return call  # type: ignore[return-value]


def _split(own: Callable[..., Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a method of the peer takes itself, and what our loop does. One that takes any keyword takes all itself."""
    parameters = inspect.signature(own).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    ours = {name: options[name] for name in options.keys() & LOOP_OPTIONS if name not in parameters and not takes_any}
    return {name: value for name, value in options.items() if name not in ours}, ours
