"""The mixin for the GaussianDiffusion of Zhihu's tutorial on DDPM, which many notebooks contain in some variation.

A class is recognized by the parameters of its methods. The rows are made from the object's tables. Before a method is
fused for samples of some shape, it runs on trial samples of this shape, and its result is compared with that of the
rows: see tutorial_trial.py. If a subclass overrides a method, the training methods that depend on it are not fused.
Steps that depend on it are fused only with trace=True, once a first loop has proven them: see proof.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpm_ext import ops
from ddpm_ext.base.torch_version import torch_default_device
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.integrations.fallback import Fallback, attempt, returning, with_fallback
from ddpm_ext.integrations.loop_options import LoopOptionsTaker, takes_loop_options
from ddpm_ext.integrations.peer_tables import TABLES
from ddpm_ext.integrations.shared import CACHED, Support, new, peer_method, signature_text
from ddpm_ext.integrations.tensors import check_batch, check_output, noise_arguments, noise_itself, wants_gradient
from ddpm_ext.integrations.tutorial_trial import GradMode, checked_rows, copied, try_step, try_training
from ddpm_ext.ops.noise import STREAM_START, Philox, randn
from ddpm_ext.process.process import SCHEDULE_ATTRIBUTES
from ddpm_ext.tables.on_device import KernelTables

Model = Callable[..., Tensor]
METHODS = {  # {method: its first parameters after self}
    "q_sample": "x_start, t, noise=None",
    "p_mean_variance": "model, x_t, t, clip_denoised=True",
    "p_sample": "model, x_t, t, clip_denoised=True",
    "p_sample_loop": "model, shape",
    "sample": "model, image_size",
    "train_losses": "model, x_start, t",
}

TRAINING = ("q_sample", "train_losses")
LOOPS = {"sample", "p_sample_loop"}
NOT_CALLED = {  # {method: methods that it never calls}
    "p_sample": LOOPS | {*TRAINING},
    "q_sample": LOOPS | {"train_losses", "p_sample", "p_mean_variance"},
    "train_losses": LOOPS | {"p_sample", "p_mean_variance"},
}
NOT_COPIED = {*CACHED, "_acceleration"}  # attributes that the copy of an object for a trial leaves out
PROBE_SHAPE = (2, 3, 8, 8)  # the samples' shape in the trial that comes before a loop by ddpm_ext's p_sample_loop

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
    """Whether a class has the tutorial's methods, with the same names, order and defaults of their first parameters."""
    if issubclass(cls, GaussianDiffusion):  # ddpm_ext's own class, which is fused already
        return False
    for name, expected in METHODS.items():
        method = getattr(cls, name, None)
        if not inspect.isfunction(method):
            return False
        _, _, parameters = signature_text(method)[:-1].partition(", ")  # after self
        if parameters != expected and not parameters.startswith(f"{expected}, "):
            return False
    return True


@functools.lru_cache(64)
def _methods(caller: str, classes: tuple[type, ...], counts: tuple[int, ...]) -> tuple[frozenset[str], str | None]:
    """The methods of these classes that the method `caller` may call, and the first one that a class overrides, if any.

    Args:
        counts: the numbers of the classes' attributes. They are part of the cache key, because methods may be added to
            a class.
    """
    names: set[str] = set()
    overridden = None
    for base in classes:
        methods = {
            name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("__")
        }
        overridden = overridden or min(names & methods - NOT_CALLED[caller], default=None)
        names |= methods
    return frozenset(names - NOT_CALLED[caller]), overridden


class Tried(NamedTuple):
    """The result of a trial that succeeded: the rows, and the grad mode in which the object's method runs its code."""

    rows: KernelTables
    grad_mode: GradMode


class _StartNoise(TorchFunctionMode):
    """A mode, for noise="philox", in which `rng` draws a loop's start noise: the first torch.randn before the steps."""

    def __init__(self, rng: Philox) -> None:
        super().__init__()
        self.rng, self.used, self.active = rng, False, ExitStack()

    def end(self) -> None:
        """Called before the first step. Exits this mode, unless another mode was entered later.

        Torch can only exit the mode that was entered last. If that is not this mode, this one stays active until the
        loop ends, and does nothing.
        """
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
    """The mixin for a class that resembles the tutorial's. An accelerated class derives from both, the mixin first."""

    library = "the tutorial's class"
    replaces = ("q_sample", "p_sample", "p_sample_loop", "train_losses")

    # ------------------------------------------------------------------------------------------------ rows and trials

    def _user_classes(self) -> Sequence[type]:
        return [base for base in self._peer.__mro__ if base not in (nn.Module, object)]

    def _foreign_method(self, caller: str = "p_sample") -> str | None:
        """The name of a method that `caller` may call, and that a subclass or the object overrides; None if none is."""
        classes = tuple(self._user_classes())
        methods, overridden = _methods(caller, classes, tuple([len(vars(base)) for base in classes]))
        return min(methods & self.__dict__.keys(), default=overridden)

    def _check(self) -> None:
        """Raises TypeError if the tables are not the tutorial's."""
        rows = attempt(self._rows)
        if isinstance(rows, Fallback):
            name = f"{self._peer.__module__}.{self._peer.__qualname__}"
            raise TypeError(f"obj is a {name}, which cannot be accelerated as the tutorial's class: {rows.reason}")

    def _rows(self) -> KernelTables:
        """The rows of the object's current tables, cached. Raises Fallback if they are not the tutorial's."""
        tables = {name: getattr(self, name, None) for name in SCHEDULE_ATTRIBUTES}
        return self._cached_by_state(tables.values(), lambda: checked_rows(tables))

    def _tried(self, method: str, shape: Sequence[int], device: torch.device, *clip: bool) -> Tried:
        """Runs the trial of a method on samples of this shape, once for each state of the object.

        Raises Fallback if the method's results differ from those of the tutorial's method.

        Args:
            clip: for p_sample, its clip_denoised. Nothing for a training method.
        """

        def run() -> Tried:
            rows = self._rows()
            trial_object = new(self._peer)
            vars(trial_object).update(copied({n: x for n, x in self.__dict__.items() if n not in NOT_COPIED}))
            if method in TRAINING:
                return Tried(rows, try_training(trial_object, rows, method, shape, device))
            return Tried(rows, try_step(trial_object, rows, shape, device, *clip))

        return self._cached_by_state((method, torch.Size(shape), device, *clip), run, self._state())

    def _rows_for_training(
        self, method: str, x: Any, t: Any, has_more: bool, noise: Tensor | None = None
    ) -> KernelTables:
        """The rows for a call of a training method. Raises Fallback if the call has no fused form.

        Args:
            has_more: whether the call has arguments that the tutorial's method doesn't have.
        """
        if has_more:
            raise Fallback("it has arguments that the tutorial's hasn't")
        check_batch(x, t, noise, (torch.float32,))
        foreign = self._foreign_method(method)
        if foreign is not None:
            raise Fallback(f"its {foreign} overrides another")
        return self._tried(method, x.shape, x.device).rows

    # --------------------------------------------------------------------------------------------------------- steps

    def p_sample(
        self, model: Model, x_t: Tensor, t: Tensor, clip_denoised: bool = True, *args: Any, **kwargs: Any
    ) -> Tensor:
        start: _StartNoise | None = self.__dict__.pop("_start_noise", None)
        if start is not None:
            if not start.used:
                self.accelerated.record_fallback(self.library, "p_sample_loop", "it begins with noise of its own")
            start.end()
        return self._p_sample(model, x_t, t, clip_denoised, *args, **kwargs)

    @with_fallback("p_sample", compiles=False)
    def _p_sample(self, model: Model, x_t: Tensor, t: Tensor, clip_denoised: bool, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise Fallback("it has arguments that the tutorial's hasn't")
        check_batch(x_t, t, None, (torch.float32,))
        trial = x_t.device, bool(clip_denoised)
        peers_step = peer_method(self, "p_sample")

        def by_rows() -> Tensor:
            is_proven = "_is_proving" in self.__dict__
            tried = Tried(self._rows(), torch.no_grad) if is_proven else self._tried("p_sample", x_t.shape, *trial)
            with tried.grad_mode():
                output = model(x_t, t)
                check_output(x_t, output, lambda: peers_step(returning(output), x_t, t, clip_denoised))
                clip = (-1.0, 1.0) if clip_denoised else None
                rng = self.accelerated.rng_of_step_at(t, len(tried.rows))
                source: dict[str, Any] = {"rng": rng}
                if rng is None:
                    noise = torch.randn_like(x_t)
                    source = {"noise": noise} if wants_gradient(x_t, output) else noise_arguments(noise, x_t)
                table = tried.rows.get("steps", x_t.device, torch.float32)
                return ops.reverse_step(x_t, output, table, t, clip=clip, **source)

        by_code = functools.partial(peers_step, model, x_t, t, clip_denoised)
        return self._step("p_sample", x_t, t.tolist, (clip_denoised,), by_rows, by_code)

    @takes_loop_options
    def p_sample_loop(self, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the class's loop, whose steps are fused, or GaussianDiffusion.p_sample_loop for a call with its options.

        With noise="philox" the loop's start noise also follows the noise contract.
        """
        settings, peers_loop = self.accelerated, peer_method(self, "p_sample_loop")
        if settings.noise == "torch" or torch.compiler.is_compiling() or self._foreign_method() is not None:
            return peers_loop(model, shape, *args, **kwargs)  # a step that falls back records the reason itself
        settings.begin_loop()
        assert settings.rng is not None
        start = self.__dict__["_start_noise"] = _StartNoise(settings.rng)
        with start.active:
            start.active.enter_context(start)
            try:
                return peers_loop(model, shape, *args, **kwargs)
            finally:
                self.__dict__.pop("_start_noise", None)
                settings.end_loop()

    def _prediction(self) -> str:
        """The model's prediction, which is "eps". Raises Fallback if a trial of p_sample does not confirm it."""
        foreign = self._foreign_method()
        if foreign is not None:
            raise Fallback(f"its {foreign} overrides another")
        self._tried("p_sample", PROBE_SHAPE, getattr(self, TABLES[0]).device, True)
        return "eps"

    # ------------------------------------------------------------------------------------------------------ training

    @with_fallback(compiles=False)
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        rows = self._rows_for_training("q_sample", x_start, t, bool(args or kwargs), noise)
        table = rows.get("q_sample", x_start.device, torch.float32)
        return ops.forward_process(x_start, table, t, **self._training_noise(x_start, noise))

    @with_fallback(compiles=False)
    def train_losses(self, model: Model, x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self._rows_for_training("train_losses", x_start, t, bool(args or kwargs))
        if wants_gradient(x_start):
            raise Fallback("a gradient by images is asked for")
        source, device = self._training_noise(x_start), x_start.device
        noisy = ops.forward_process(x_start, rows.get("q_sample", device, torch.float32), t, **source)
        output = model(noisy, t)
        check_output(x_start, output, lambda: F.mse_loss(noise_itself(source, x_start), output))
        return ops.diffusion_loss(output, None, rows.get("loss", device, torch.float32), t, **source)
