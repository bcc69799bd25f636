"""The GaussianDiffusion of the well-known tutorial, a class of many notebooks: known by its methods' parameters.

Many have a variation of it. Rows are made of the object's own tables, and before anything is fused each of its methods
is run once, on a few numbers at every timestep, and compared with the fused one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpm_ext import ops
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.integrations.registry import Support
from ddpm_ext.integrations.shared import Accelerated, drawn, misfit, new, version, wants_gradient
from ddpm_ext.ops.noise import Philox, randn
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.step_table import StepTable

__all__ = ["SUPPORT", "Tutorial", "output_misfit", "posterior_steps", "resembles"]

METHODS: dict[str, dict[str, Any]] = {
    "q_sample": {"x_start": ..., "t": ..., "noise": None},
    "p_mean_variance": {"model": ..., "x_t": ..., "t": ..., "clip_denoised": True},
    "p_sample": {"model": ..., "x_t": ..., "t": ..., "clip_denoised": True},
    "p_sample_loop": {"model": ..., "shape": ...},
    "sample": {"model": ..., "image_size": ...},
    "train_losses": {"model": ..., "x_start": ..., "t": ...},
}
TABLES = (
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
OTHERS = (  # which a variation's methods may use
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "log_one_minus_alphas_cumprod",
    "posterior_variance",
)
KEPT = 4  # states of the tables
TOLERANCE = 1e-5  # of the terms of a sum in float32, in any order

SUPPORT = tuple(
    Support("the tutorial's class", *row)
    for row in (
        (
            "p_sample",
            "float32; clip_denoised or not; gradients where the class's own has them",
            "other dtypes; arguments that the tutorial's hasn't; a model's output of another shape",
        ),
        ("p_sample_loop, sample", "their steps, as p_sample", "the loop around them"),
        ("q_sample", "float32, with gradients", "as p_sample; torch.compile; torch.func; what is not the tutorial's"),
        (
            "train_losses",
            "float32; the noise's mean squared error; autocast; a second derivative is refused",
            "as q_sample; gradients by images",
        ),
        ("all others", "", "all"),
    )
)


def resembles(cls: type) -> bool:
    """Whether a class has the tutorial's methods, whose first parameters have its names, order and defaults."""
    if issubclass(cls, GaussianDiffusion):  # ours
        return False
    for name, expected in METHODS.items():
        method = getattr(cls, name, None)
        if not inspect.isfunction(method):
            return False
        found = list(inspect.signature(method).parameters.values())[1 : len(expected) + 1]
        if [parameter.name for parameter in found] != list(expected):
            return False
        for parameter, default in zip(found, expected.values(), strict=True):
            given = ... if parameter.default is parameter.empty else parameter.default
            if parameter.kind != parameter.POSITIONAL_OR_KEYWORD or given is not default:
                return False
    return True


def posterior_steps(own: dict[str, Tensor], a: Tensor, b: Tensor) -> StepTable:
    """Row t draws from q(x_{t-1} | x_t, x_0 = a x_t + b m), by an object's own tables, in float64, by their names."""
    deviation = (own["posterior_log_variance_clipped"] / 2).exp()
    deviation[0] = 0  # no noise there
    t = torch.arange(len(a), device="cpu")
    return StepTable(t, a, b, own["posterior_mean_coef1"], own["posterior_mean_coef2"], s=deviation)


def output_misfit(x: Tensor, output: Any, narrow: bool = True) -> str | None:
    """Why a model's output is none for samples x. narrow: it may have 16 bits where they have 32."""
    taken = (torch.float32, torch.float16, torch.bfloat16) if narrow and x.dtype == torch.float32 else (x.dtype,)
    if misfit(x, output) is None and output.dtype in taken:
        return None
    if type(output) is not Tensor:
        return f"the model's output is a {type(output).__name__}"
    return f"the model's output is {str(output.dtype).removeprefix('torch.')} of shape {tuple(output.shape)}"


class _Plan(NamedTuple):
    """What an object's tables come to, after its methods were tried.

    made_of: they themselves, kept alive; why: why nothing is fused; own: how other methods than p_sample differ from
    the tutorial's, None where they don't; mode: p_sample's, in which it keeps gradients or not.
    """

    made_of: tuple[Any, ...] = ()
    tables: StepDeviceTables | None = None
    why: str | None = None
    own: Mapping[str, str | None] = MappingProxyType({})
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext

    def rows(self, name: str, x: Tensor) -> Tensor:
        assert self.tables is not None
        return self.tables.get(name, x.device, torch.float32)


class _Given(nn.Module):
    """A model whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.output


class _Probe(nn.Module):
    """A model with a parameter, which draws a number before it answers, so that the order of draws shows."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, device=device))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        torch.rand((), device=x.device)
        return x.flip(-1) + self.weight * x + (t / 1000).reshape(-1, *[1] * (x.dim() - 1))


class _Start(TorchFunctionMode):
    """Answers a loop's torch.randn with the noise contract's, until the loop takes its first step."""

    def __init__(self, rng: Philox) -> None:
        super().__init__()
        self.rng, self.answered, self.active = rng, False, ExitStack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and not self.answered and kwargs.keys() <= {"size", "device", "dtype"}:
            sizes = kwargs.get("size", args)
            shape = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if dtype == torch.float32:
                self.answered = True
                return randn(shape, self.rng, device=kwargs.get("device") or torch.get_default_device())
        return func(*args, **kwargs)


class Tutorial(Accelerated):
    """Before a class that resembles the tutorial's."""

    library = "the tutorial's class"
    replaces = ("q_sample", "p_sample", "p_sample_loop", "train_losses")

    # ----------------------------------------------------------------------------------------------------- what fits

    def _check(self) -> None:
        """Raises TypeError: tables or methods that are not the tutorial's."""
        why = self._plan().why
        if why is not None:
            peer = self._peer
            raise TypeError(f"obj is a {peer.__module__}.{peer.__qualname__}: {why}, expected the tutorial's")

    def _plan(self) -> _Plan:
        """Of the tables as they are."""
        if torch.compiler.is_compiling():
            return _Plan(why="it is being compiled")
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return _Plan(why="a transform of torch.func is at work")
        own = tuple([getattr(self, name, None) for name in (*TABLES, *OTHERS)])
        key = tuple([version(x) if isinstance(x, Tensor) else id(x) for x in own])
        plans = self.__dict__.setdefault("_plans", {})
        plan = plans.get(key)
        if plan is None:
            while len(plans) >= KEPT:
                del plans[next(iter(plans))]
            plain = new(self._peer)  # the object as its own class has it
            plain.__dict__.update(self.__dict__)
            with torch.inference_mode(False), torch.enable_grad():
                plan = plans[key] = _make_plan(plain, own)._replace(made_of=own)
        return plan

    def _fitting(self, method: str, x: Any, t: Any, more: bool, noise: Tensor | None = None) -> _Plan | None:
        """What such samples need; None, which is said: they have no fused form."""
        plan = self._plan()
        why = plan.why or plan.own.get(method) or misfit(x, noise)
        if why is None and more:
            why = "it has arguments that the tutorial's hasn't"
        if why is None:
            for y in (x, noise):
                if y is not None and y.dtype != torch.float32:
                    why = f"its samples are {str(y.dtype).removeprefix('torch.')}"
        if why is None and not (
            isinstance(t, Tensor) and t.dtype == torch.int64 and t.shape == x.shape[:1] and t.device == x.device
        ):
            why = "t is not one int64 timestep a sample"
        return plan if why is None else self._aside(method, why)

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
        start = self.__dict__.get("_plans", {}).pop(_Start, None)
        if start is not None:
            start.active.close()
            if not start.answered:
                self._aside("p_sample_loop", "it begins with noise of its own")
        plan = self._fitting("p_sample", x_t, t, bool(args or kwargs))
        if plan is None:
            return super().p_sample(model, x_t, t, clip_denoised, *args, **kwargs)  # type: ignore[misc]
        with plan.mode():
            output = model(x_t, t)
            why = output_misfit(x_t, output)
            if why is not None:
                self._aside("p_sample", why)
                return super().p_sample(_Given(output), x_t, t, clip_denoised)  # type: ignore[misc]
            clip, rng = (-1.0, 1.0) if clip_denoised else None, self.accelerated.rng
            source: dict[str, Any] = {"rng": rng}
            if rng is None:
                noise = torch.randn_like(x_t)
                source = {"noise": noise} if wants_gradient(x_t, output) else drawn(noise, x_t)
            return ops.reverse_step(x_t, output, plan.rows("steps", x_t), t, clip=clip, **source)

    def p_sample_loop(self, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        """The class's own loop, whose steps are fused; noise="philox" gives it the noise that it begins with, too."""
        rng = self.accelerated.start()
        if rng is None or self._plan().why is not None:
            return super().p_sample_loop(model, shape, *args, **kwargs)  # type: ignore[misc]
        start = _Start(rng)
        plans = self.__dict__.setdefault("_plans", {})
        plans[_Start] = start
        with start.active:
            start.active.enter_context(start)
            try:
                return super().p_sample_loop(model, shape, *args, **kwargs)  # type: ignore[misc]
            finally:
                plans.pop(_Start, None)

    # ------------------------------------------------------------------------------------------------------ training

    def _training_noise(self, x: Tensor) -> tuple[Tensor | None, Philox | None]:
        rng = self.accelerated.next_forward()
        return (torch.randn_like(x), None) if rng is None else (None, rng)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        plan = self._fitting("q_sample", x_start, t, bool(args or kwargs), noise)
        if plan is None:
            return super().q_sample(x_start, t, noise, *args, **kwargs)  # type: ignore[misc]
        rng = None
        if noise is None:
            noise, rng = self._training_noise(x_start)
        return ops.forward_process(x_start, plan.rows("q_sample", x_start), t, noise=noise, rng=rng)

    def train_losses(
        self, model: Callable[..., Tensor], x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        plan = self._fitting("train_losses", x_start, t, bool(args or kwargs))
        if plan is not None and wants_gradient(x_start):
            plan = self._aside("train_losses", "a gradient by images is asked for")
        if plan is None:
            return super().train_losses(model, x_start, t, *args, **kwargs)  # type: ignore[misc]
        noise, rng = self._training_noise(x_start)
        output = model(ops.forward_process(x_start, plan.rows("q_sample", x_start), t, noise=noise, rng=rng), t)
        why = output_misfit(x_start, output)
        if why is not None:
            self._aside("train_losses", why)
            return F.mse_loss(randn(x_start.shape, rng, device=x_start.device) if noise is None else noise, output)
        return ops.diffusion_loss(output, None, plan.rows("loss", x_start), t, noise=noise, rng=rng)


# ------------------------------------------------------------------------------------------ a class's own methods


def _make_plan(peer: Any, made_of: tuple[Any, ...]) -> _Plan:
    """Of an object of a class and its tables."""
    rows = made_of[0].shape if isinstance(made_of[0], Tensor) else ()
    for name, table in zip(TABLES, made_of, strict=False):
        if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
            return _Plan(why=f"its {name} is no tensor of float32 or float64")
        if table.shape != rows or table.dim() != 1:
            return _Plan(why=f"its {name} has shape {tuple(table.shape)}, no number a timestep")
    own = {name: x.detach().to("cpu", torch.float64) for name, x in zip(TABLES, made_of, strict=False)}
    signal, noise = own["sqrt_alphas_cumprod"], own["sqrt_one_minus_alphas_cumprod"]
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    try:
        steps = posterior_steps(own, own["sqrt_recip_alphas_cumprod"], -own["sqrt_recipm1_alphas_cumprod"])
    except ValueError as error:  # numbers that are not finite
        return _Plan(why=f"its tables make no rows: {error}")
    q_sample, loss = torch.stack([signal, noise], 1), torch.stack([zeros, ones, ones, zeros], 1)
    tables = StepDeviceTables(steps, q_sample=q_sample, loss=loss)
    trial = _Trial(peer, steps, tables, made_of[0].device)
    why = trial.steps()
    methods = {} if why else {"q_sample": trial.q_sample(), "train_losses": trial.train_losses()}
    return _Plan((), tables, why, methods, trial.mode)


class _Trial:
    """A class's methods beside the fused ones, on three numbers at each timestep."""

    def __init__(self, peer: Any, steps: StepTable, tables: StepDeviceTables, device: torch.device) -> None:
        self.peer, self.device = peer, device
        self.rows = {name: tables.get(name, device, torch.float32) for name in ("steps", "q_sample", "loss")}
        self.t = torch.arange(len(steps), device=device)
        numbers = torch.randn(2, len(steps), 1, 1, 3, generator=torch.Generator().manual_seed(0))
        self.x, self.z = numbers.to(device).unbind(0)
        self.model = _Probe(device)
        a, b, c0, c1, _, s = self.rows["steps"][:, :6].abs().reshape(-1, 6, 1, 1, 1).unbind(1)
        x, m = self.x.abs(), self._drawing_alone(lambda: self._ask(self.x)).abs()
        self.size = c0 * (a * x + b * m) + c1 * x + 5 * s  # of a step's terms
        self.mode: Callable[[], AbstractContextManager[Any]] = nullcontext  # p_sample's

    def _ask(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x, self.t)

    def _drawing_alone(self, call: Callable[[], Any]) -> Any:
        """What it gives. Generators are as before it: the next call draws the same."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return call()

    def _unlike(
        self, name: str, call: Callable[[], Any], fused: Callable[[], Tensor], size: Tensor | None = None
    ) -> str | None:
        """How what `call` gives is not what `fused` does, to rounding of terms of a size."""
        with torch.no_grad():
            expected = self._drawing_alone(fused)
        try:
            found = self._drawing_alone(call)
            if found.shape != expected.shape or found.dtype != expected.dtype:
                return f"its {name} gives {found.dtype} of shape {tuple(found.shape)}"
            distance = (found.detach() - expected).abs().flatten()
        except Exception as error:  # anybody's code
            return f"its {name} raises {type(error).__name__}: {error}"
        wrong = ~(distance <= TOLERANCE * (expected.abs() if size is None else size).flatten())  # NaN is wrong
        if not wrong.any():
            return None
        at = int(wrong.nonzero()[0])
        where = f" at t = {at * len(self.t) // len(distance)}" if expected.dim() else ""
        gives, wanted = (numbers.flatten()[at].item() for numbers in (found, expected))
        return f"its {name} gives {gives:.6g}{where}, where the tutorial's gives {wanted:.6g}"

    # -------------------------------------------------------------------------------------------------------- steps

    def _fused_step(self, clip: bool, noisy: bool) -> Tensor:
        m = self._ask(self.x)  # which draws first
        noise: dict[str, Any] = {"noise": torch.randn_like(self.x)} if noisy else {"add_noise": False}
        return ops.reverse_step(self.x, m, self.rows["steps"], self.t, clip=(-1.0, 1.0) if clip else None, **noise)

    def _own_mean(self, clip: bool) -> Any:
        return self.peer.p_mean_variance(self.model, self.x, self.t, clip_denoised=clip)[0]

    def _own_step(self, clip: bool) -> Any:
        found = self.peer.p_sample(self.model, self.x, self.t, clip_denoised=clip)
        kept = nullcontext if found.requires_grad else torch.no_grad
        self.mode = torch.inference_mode if found.is_inference() else kept
        return found

    def steps(self) -> str | None:
        for clip in (True, False):
            for name, own, noisy in (("p_mean_variance", self._own_mean, False), ("p_sample", self._own_step, True)):
                why = self._unlike(name, partial(own, clip), partial(self._fused_step, clip, noisy), self.size)
                if why is not None:
                    return why
        return None

    # ----------------------------------------------------------------------------------------------------- training

    def _noised(self, z: Tensor | None = None) -> Tensor:
        z = torch.randn_like(self.x) if z is None else z
        return ops.forward_process(self.x, self.rows["q_sample"], self.t, noise=z)

    def q_sample(self) -> str | None:
        size = self.x.abs() + 5
        for noise in ((), (self.z,)):
            own = partial(self.peer.q_sample, self.x, self.t, *noise)
            why = self._unlike("q_sample", own, partial(self._noised, *noise), size)
            if why is not None:
                return why
        return None

    def _fused_loss(self) -> Tensor:
        z = torch.randn_like(self.x)
        return ops.diffusion_loss(self._ask(self._noised(z)), None, self.rows["loss"], self.t, noise=z)

    def train_losses(self) -> str | None:
        own = partial(self.peer.train_losses, self.model, self.x, self.t)
        return self._unlike("train_losses", own, self._fused_loss)
