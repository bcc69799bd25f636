"""The GaussianDiffusion of a well-known tutorial, found in many notebooks, recognised by its methods' parameters.

There are many variations of it. The rows are made of the object's own tables, and before anything is fused its methods
run on small samples, a step at every timestep, and are compared with these rows: see tutorial_trial.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpm_ext import ops
from ddpm_ext.base.torch_version import torch_default_device
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.integrations.fallback import Fallback, attempt, returning, with_fallback
from ddpm_ext.integrations.loop_options import LoopOptionsTaker, takes_loop_options
from ddpm_ext.integrations.own_tables import TABLES
from ddpm_ext.integrations.shared import Support, new, peer_method, signature_text
from ddpm_ext.integrations.tensors import check_batch, check_output, noise_arguments, noise_itself, wants_gradient
from ddpm_ext.integrations.tutorial_trial import FusedMethods, attributes_read, try_methods
from ddpm_ext.ops.noise import STREAM_START, Philox, randn
from ddpm_ext.process.process import SCHEDULE_ATTRIBUTES

METHODS = {  # their first parameters
    "q_sample": "x_start, t, noise=None",
    "p_mean_variance": "model, x_t, t, clip_denoised=True",
    "p_sample": "model, x_t, t, clip_denoised=True",
    "p_sample_loop": "model, shape",
    "sample": "model, image_size",
    "train_losses": "model, x_start, t",
}

SUPPORT = tuple(
    Support("the tutorial's class", *row)
    for row in (
        (
            "p_sample",
            "float32; clip_denoised or not; gradients where the class's own method has them",
            "other dtypes; arguments that the tutorial's method doesn't have; a model's output of another shape",
        ),
        (
            "p_sample_loop, sample",
            "their steps, as p_sample; with options of ddpm_ext's p_sample_loop that loop, and its noise",
            "without these, the loop around the steps",
        ),
        (
            "q_sample",
            "float32, with gradients",
            "as p_sample; torch.compile; torch.func; a method that differs from the tutorial's",
        ),
        (
            "train_losses",
            "float32; the mean squared error of the noise; autocast; a second derivative is refused",
            "as q_sample; gradients by images",
        ),
        ("all others", "", "all"),
    )
)


def resembles(cls: type) -> bool:
    """Whether a class has the tutorial's methods: by the names, order and defaults of their first parameters."""
    if issubclass(cls, GaussianDiffusion):  # ours
        return False
    for name, expected in METHODS.items():
        method = getattr(cls, name, None)
        if not inspect.isfunction(method):
            return False
        _, _, found = signature_text(method)[:-1].partition(", ")  # after self
        if found != expected and not found.startswith(f"{expected}, "):
            return False
    return True


class _StartNoise(TorchFunctionMode):
    """Gives the noise contract's numbers to the first torch.randn of a loop, until the loop takes its first step."""

    def __init__(self, rng: Philox) -> None:
        super().__init__()
        self.rng, self.used, self.active = rng, False, ExitStack()

    def end(self) -> None:
        """Is called before the first step. Torch leaves the mode that was entered last, which another one may be: then
        this one stays until the loop ends, and does nothing."""
        self.used = True
        if torch._C._get_function_stack_at(torch._C._len_torch_function_stack() - 1) is self:
            self.active.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and not self.used and kwargs.keys() <= {"size", "device", "dtype"}:
            sizes = kwargs.get("size", args)
            shape = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if dtype == torch.float32:
                self.used = True
                device = kwargs.get("device") or torch_default_device()
                return randn(shape, self.rng, stream=STREAM_START, device=device)
        return func(*args, **kwargs)


class Tutorial(LoopOptionsTaker):
    """Mixin placed in the bases before a class that resembles the tutorial's."""

    library = "the tutorial's class"
    replaces = ("q_sample", "p_sample", "p_sample_loop", "train_losses")

    # ----------------------------------------------------------------------------------------------------- what fits

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        peer: type = cls.__dict__.get("_peer", object)
        own = {name: each for of in peer.__mro__ if of is not nn.Module for name, each in vars(of).items()}
        cls._methods = tuple(name for name, each in own.items() if inspect.isfunction(each))

    def _check(self) -> None:
        """Raises TypeError where the tables or methods are not the tutorial's."""
        self.__dict__["_read"] = attributes_read(self._peer, vars(self), getattr(self, TABLES[0], None))
        found = attempt(self._fused_methods)
        if isinstance(found, Fallback):
            name = f"{self._peer.__module__}.{self._peer.__qualname__}"
            raise TypeError(f"obj is a {name}, which cannot be accelerated as the tutorial's class: {found.reason}")

    def _fused_methods(self) -> FusedMethods:
        """What the tables as they are give. Raises Fallback where nothing is fused."""
        # All tables, since a variation's methods may use the others, too; and what else its steps read.
        tables = [getattr(self, name, None) for name in SCHEDULE_ATTRIBUTES]
        own = self.__dict__
        read = [own.get(name) for name in own.get("_read", ())]

        def make() -> FusedMethods:
            plain = new(self._peer)
            plain.__dict__.update(self.__dict__)
            return try_methods(plain, dict(zip(SCHEDULE_ATTRIBUTES, tables, strict=True)))

        return self._of_state((*tables, *read), make)

    def _fused(self, method: str, x: Any, t: Any, more: bool, noise: Tensor | None = None) -> FusedMethods:
        """What a call of `method` needs. Raises Fallback where it has no fused form.

        more: whether the call has arguments that the tutorial's method doesn't have.
        """
        fused = self._fused_methods()
        differs = fused.differs.get(method)
        if differs is not None:
            raise Fallback(differs)
        if more:
            raise Fallback("it has arguments that the tutorial's hasn't")
        check_batch(x, t, noise, (torch.float32,))
        return fused

    # --------------------------------------------------------------------------------------------------------- steps

    def p_sample(
        self,
        model: Callable[..., Tensor],
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        start: _StartNoise | None = self.__dict__.pop("_start_noise", None)
        if start is not None:
            if not start.used:
                self.accelerated.record_fallback(self.library, "p_sample_loop", "it begins with noise of its own")
            start.end()
        return self._p_sample(model, x_t, t, clip_denoised, *args, **kwargs)

    @with_fallback("p_sample", compiles=False)
    def _p_sample(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, clip_denoised: bool, *args: Any, **kwargs: Any
    ) -> Tensor:
        fused = self._fused("p_sample", x_t, t, bool(args or kwargs))
        own = peer_method(self, "p_sample")
        with fused.grad_mode():
            output = model(x_t, t)
            check_output(x_t, output, lambda: own(returning(output), x_t, t, clip_denoised))
            clip = (-1.0, 1.0) if clip_denoised else None
            rng = self.accelerated.rng_of_step_at(t, len(fused.tables))
            source: dict[str, Any] = {"rng": rng}
            if rng is None:
                noise = torch.randn_like(x_t)
                source = {"noise": noise} if wants_gradient(x_t, output) else noise_arguments(noise, x_t)
            return ops.reverse_step(x_t, output, fused.rows("steps", x_t), t, clip=clip, **source)

    @takes_loop_options
    def p_sample_loop(self, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        """The class's own loop, whose steps are fused; with noise="philox" it also starts from the contract's noise.
        With options of GaussianDiffusion.p_sample_loop, that loop."""
        settings, own = self.accelerated, peer_method(self, "p_sample_loop")
        plain = settings.noise == "torch" or torch.compiler.is_compiling()
        if plain or isinstance(attempt(self._fused_methods), Fallback):
            return own(model, shape, *args, **kwargs)  # each step says why it falls back
        settings.begin_loop()
        assert settings.rng is not None
        start = self.__dict__["_start_noise"] = _StartNoise(settings.rng)
        with start.active:
            start.active.enter_context(start)
            try:
                return own(model, shape, *args, **kwargs)
            finally:
                self.__dict__.pop("_start_noise", None)
                settings.end_loop()

    def _prediction(self) -> str:
        self._fused_methods()  # its steps are the tutorial's
        return "eps"

    # ------------------------------------------------------------------------------------------------------ training

    @with_fallback(compiles=False)
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        fused = self._fused("q_sample", x_start, t, bool(args or kwargs), noise)
        return ops.forward_process(x_start, fused.rows("q_sample", x_start), t, **self._training_noise(x_start, noise))

    @with_fallback(compiles=False)
    def train_losses(
        self, model: Callable[..., Tensor], x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        fused = self._fused("train_losses", x_start, t, bool(args or kwargs))
        if wants_gradient(x_start):
            raise Fallback("a gradient by images is asked for")
        source = self._training_noise(x_start)
        output = model(ops.forward_process(x_start, fused.rows("q_sample", x_start), t, **source), t)
        check_output(x_start, output, lambda: F.mse_loss(noise_itself(source, x_start), output))
        return ops.diffusion_loss(output, None, fused.rows("loss", x_start), t, **source)
