"""Whether a class that resembles the tutorial's does the same: each method runs beside the fused one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.step_table import StepTable

__all__ = ["TABLES", "FusedMethods", "posterior_steps", "try_methods"]

TABLES = (
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
TOLERANCE = 1e-5  # relative to the terms of a sum in float32, added in any order


def posterior_steps(own: dict[str, Tensor], a: Tensor, b: Tensor) -> StepTable:
    """Row t draws from q(x_{t-1} | x_t, x_0 = a x_t + b m).

    own: an object's tables by their names, float64.
    """
    deviation = (own["posterior_log_variance_clipped"] / 2).exp()
    deviation[0] = 0  # no noise there
    t = torch.arange(len(a), device="cpu")
    return StepTable(t, a, b, own["posterior_mean_coef1"], own["posterior_mean_coef2"], s=deviation)


class FusedMethods(NamedTuple):
    """What an object's tables give, after its methods were tried.

    Attributes:
        tables: the rows.
        differs: of each method but p_sample, how it differs from the tutorial's, or None where it doesn't.
        grad_mode: the mode in which the object's p_sample runs: with gradients or without.
    """

    tables: StepDeviceTables
    differs: Mapping[str, str | None]
    grad_mode: Callable[[], AbstractContextManager[Any]]

    def rows(self, name: str, x: Tensor) -> Tensor:
        return self.tables.get(name, x.device, torch.float32)


class _Probe(nn.Module):
    """A model with a parameter. It draws a number before it returns, so that the order of draws shows."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, device=device))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        torch.rand((), device=x.device)
        return x.flip(-1) + self.weight * x + (t / 1000).reshape(-1, *[1] * (x.dim() - 1))


def try_methods(peer: Any, tables: tuple[Any, ...]) -> FusedMethods:
    """What an object of the class gives, and its tables, in the order of TABLES. Raises Fallback where nothing does."""
    shape = tables[0].shape if isinstance(tables[0], Tensor) else ()
    for name, table in zip(TABLES, tables, strict=False):
        if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
            raise Fallback(f"its {name} is no tensor of float32 or float64")
        if table.shape != shape or table.dim() != 1:
            raise Fallback(f"its {name} has shape {tuple(table.shape)}, no number a timestep")
    own = {name: x.detach().to("cpu", torch.float64) for name, x in zip(TABLES, tables, strict=False)}
    signal, noise = own["sqrt_alphas_cumprod"], own["sqrt_one_minus_alphas_cumprod"]
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    try:
        steps = posterior_steps(own, own["sqrt_recip_alphas_cumprod"], -own["sqrt_recipm1_alphas_cumprod"])
    except ValueError as error:  # numbers that are not finite
        raise Fallback(f"its tables make no rows: {error}") from None
    q_sample, loss = torch.stack([signal, noise], 1), torch.stack([zeros, ones, ones, zeros], 1)
    on_device = StepDeviceTables(steps, q_sample=q_sample, loss=loss)
    trial = _Trial(peer, steps, on_device, tables[0].device)
    differs = trial.steps()
    if differs is not None:
        raise Fallback(differs)
    return FusedMethods(
        on_device, {"q_sample": trial.q_sample(), "train_losses": trial.train_losses()}, trial.grad_mode
    )


class _Trial:
    """A class's methods and the fused ones side by side, on three numbers at each timestep.

    Its methods return how the class's method differs, or None where it doesn't.
    """

    def __init__(self, peer: Any, steps: StepTable, tables: StepDeviceTables, device: torch.device) -> None:
        self.peer, self.device = peer, device
        self.rows = {name: tables.get(name, device, torch.float32) for name in ("steps", "q_sample", "loss")}
        self.t = torch.arange(len(steps), device=device)
        numbers = torch.randn(2, len(steps), 1, 1, 3, generator=torch.Generator().manual_seed(0), device="cpu")
        self.x, self.z = numbers.to(device).unbind(0)
        self.model = _Probe(device)
        a, b, c0, c1, _, s = self.rows["steps"][:, :6].abs().reshape(-1, 6, 1, 1, 1).unbind(1)
        x, m = self.x.abs(), self._with_draws_undone(lambda: self._model_output(self.x)).abs()
        self.size = c0 * (a * x + b * m) + c1 * x + 5 * s  # of a step's terms
        self.grad_mode: Callable[[], AbstractContextManager[Any]] = nullcontext  # p_sample's

    def _model_output(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x, self.t)

    def _with_draws_undone(self, call: Callable[[], Any]) -> Any:
        """call(), after which the generators are as before: the next call draws the same numbers."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return call()

    def _difference(
        self, name: str, call: Callable[[], Any], fused: Callable[[], Tensor], size: Tensor | None = None
    ) -> str | None:
        """How the results of `call` and `fused` differ by more than rounding of terms of a size, or None."""
        with torch.no_grad():
            expected = self._with_draws_undone(fused)
        try:
            found = self._with_draws_undone(call)
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
        m = self._model_output(self.x)  # the model draws first
        noise: dict[str, Any] = {"noise": torch.randn_like(self.x)} if noisy else {"add_noise": False}
        return ops.reverse_step(self.x, m, self.rows["steps"], self.t, clip=(-1.0, 1.0) if clip else None, **noise)

    def _own_mean(self, clip: bool) -> Any:
        return self.peer.p_mean_variance(self.model, self.x, self.t, clip_denoised=clip)[0]

    def _own_step(self, clip: bool) -> Any:
        found = self.peer.p_sample(self.model, self.x, self.t, clip_denoised=clip)
        grad_mode = nullcontext if found.requires_grad else torch.no_grad
        self.grad_mode = torch.inference_mode if found.is_inference() else grad_mode
        return found

    def steps(self) -> str | None:
        for clip in (True, False):
            for name, own, noisy in (("p_mean_variance", self._own_mean, False), ("p_sample", self._own_step, True)):
                differs = self._difference(name, partial(own, clip), partial(self._fused_step, clip, noisy), self.size)
                if differs is not None:
                    return differs
        return None

    # ----------------------------------------------------------------------------------------------------- training

    def _noised(self, z: Tensor | None = None) -> Tensor:
        z = torch.randn_like(self.x) if z is None else z
        return ops.forward_process(self.x, self.rows["q_sample"], self.t, noise=z)

    def q_sample(self) -> str | None:
        size = self.x.abs() + 5
        for noise in ((), (self.z,)):
            own = partial(self.peer.q_sample, self.x, self.t, *noise)
            differs = self._difference("q_sample", own, partial(self._noised, *noise), size)
            if differs is not None:
                return differs
        return None

    def _fused_loss(self) -> Tensor:
        z = torch.randn_like(self.x)
        return ops.diffusion_loss(self._model_output(self._noised(z)), None, self.rows["loss"], self.t, noise=z)

    def train_losses(self) -> str | None:
        own = partial(self.peer.train_losses, self.model, self.x, self.t)
        return self._difference("train_losses", own, self._fused_loss)
