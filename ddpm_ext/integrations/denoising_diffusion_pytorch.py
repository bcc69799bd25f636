"""denoising-diffusion-pytorch's GaussianDiffusion: a step of its loops in one launch, its training loss in two.

Images are in [0, 1] outside of it and in [-1, 1] inside: where sample and forward end and begin, its own code converts
them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.registry import Support
from ddpm_ext.integrations.shared import Accelerated, drawn, misfit, new, version, wants_gradient
from ddpm_ext.integrations.tutorial import output_misfit, posterior_steps
from ddpm_ext.ops.noise import STREAM_OFFSET, STREAM_START, Philox, randn
from ddpm_ext.tables import samplers
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.spacing import Jumps
from ddpm_ext.tables.step_table import StepTable

__all__ = ["SUPPORT", "Denoising"]

SUPPORT = tuple(
    Support("denoising_diffusion_pytorch", *row)
    for row in (
        (
            "p_sample",
            "float32, and 16 bits where the buffers have them; every objective; self-conditioning; a model's output of "
            "16 bits, but for pred_x0",
            "float64; samples of fewer bits than the buffers; a model's output of another shape",
        ),
        ("p_sample_loop", "as p_sample; return_all_timesteps", "as p_sample"),
        (
            "ddim_sample",
            "as p_sample; sampling_timesteps, ddim_sampling_eta, return_all_timesteps",
            "as p_sample; an eta that is negative, or asks for more noise than there is",
        ),
        ("sample", "by these two", "as p_sample"),
        ("interpolate", "as p_sample; t, lam", "as p_sample; images of two dtypes"),
        ("q_sample", "as p_sample, with gradients; immiscible", "as p_sample; torch.compile; torch.func"),
        (
            "p_losses, forward",
            "as q_sample; every objective and loss_weight; offset noise; loss_reduction; autocast; timesteps and the "
            "coin for self-conditioning are always the library's draws; a second derivative is refused",
            "as q_sample; gradients by images or noise",
        ),
        ("all others", "", "all"),
    )
)

BUFFERS = (
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "loss_weight",
)
LOW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW)
OLDEST = (1, 10)
KEPT = 4  # states of the buffers: replicas on several devices share an object's


def _library() -> Any:
    """The peer's module: its progress bar and its coin are looked up where they are used."""
    return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


# ------------------------------------------------------------------------------------------------------------- tables


class _Ddim(NamedTuple):
    """ddim_sample's steps, in its order.

    pairs: timesteps where each starts and arrives; tables: their rows; parts: of each the weights of x_start, of
    pred_noise and of the noise in the next sample.
    """

    pairs: list[tuple[int, int]]
    tables: StepDeviceTables
    parts: list[tuple[float, float, float]]


class _Tables:
    """The rows that an objective and the buffers make. What a buffer holds is taken from it: near t = 0 its float32 has
    digits that 1 - alphas_cumprod in float32 has lost.

    Raises ValueError: numbers that are not finite.
    """

    def __init__(self, buffers: tuple[Tensor, ...], objective: str) -> None:
        self.buffers = buffers  # kept, so that no other tensors get their ids
        self.device = buffers[0].device
        self.dtype = functools.reduce(torch.promote_types, (buffer.dtype for buffer in buffers))
        self.kept = {dtype for dtype in DTYPES if torch.promote_types(dtype, self.dtype) == dtype}
        own = {name: x.detach().to("cpu", torch.float64) for name, x in zip(BUFFERS, buffers, strict=True)}
        signal, noise = own["sqrt_alphas_cumprod"], own["sqrt_one_minus_alphas_cumprod"]
        zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
        a, b = {
            "pred_noise": (own["sqrt_recip_alphas_cumprod"], -own["sqrt_recipm1_alphas_cumprod"]),
            "pred_x0": (zeros, ones),
            "pred_v": (signal, -noise),
        }[objective]
        target = {"pred_noise": (zeros, ones), "pred_x0": (ones, zeros), "pred_v": (-noise, signal)}[objective]
        self.steps = StepDeviceTables(
            posterior_steps(own, a, b),
            q_sample=torch.stack([signal, noise], 1),
            start=torch.stack([a, b], 1),
            loss=torch.stack([*target, own["loss_weight"], zeros], 1),
        )
        self._own, self._a, self._b = own, a, b
        self._ddim: dict[tuple[int, int, float], _Ddim | str] = {}

    def ddim(self, timesteps: int, count: int, eta: float) -> _Ddim | str:
        """Or why there are none."""
        try:
            key = (timesteps, count, samplers.check_eta(eta))
            if key not in self._ddim:
                self._ddim[key] = self._make_ddim(*key)
            return self._ddim[key]
        except (TypeError, ValueError) as error:
            return str(error)

    def _make_ddim(self, timesteps: int, count: int, eta: float) -> _Ddim:
        """samplers.ddim's rows that rederive the noise, by way of sqrt_recipm1_alphas_cumprod; the last ends at x_0."""
        if not 0 < timesteps <= len(self.steps) or count < 1:
            raise ValueError(f"num_timesteps is {timesteps} and sampling_timesteps {count}")
        times = torch.linspace(-1, timesteps - 1, steps=count + 1).int().tolist()[::-1]  # in float32, as the peer's
        t = torch.tensor(times[:-1], device="cpu")
        a, b = self._a[t], self._b[t]
        c0, c1, s = torch.ones_like(a), torch.zeros_like(a), torch.zeros_like(a)
        parts = torch.stack([c0, c1, s], 1)
        if count > 1:
            kept = self._own["alphas_cumprod"][t]
            now, after = kept[:-1], kept[1:]
            made = samplers.ddim(Jumps(t[:-1], now, after, now / after), eta=eta, keep_eps=False)
            if (1 - after - made.s**2 < 0).any():
                raise ValueError(f"ddim_sampling_eta is {eta}, whose noise is more than a step ends with")
            direction = made.c1 * (1 - now).sqrt()  # what pred_noise is multiplied by
            recip, recipm1 = (self._own[f"sqrt_{name}_alphas_cumprod"][t[:-1]] for name in ("recip", "recipm1"))
            c0[:-1], c1[:-1], s[:-1] = after.sqrt() - direction / recipm1, direction * recip / recipm1, made.s
            parts[:-1] = torch.stack([after.sqrt(), direction, made.s], 1)
        rows = StepDeviceTables(StepTable(t, a, b, c0, c1, s=s))
        return _Ddim(list(itertools.pairwise(times)), rows, [tuple(row) for row in parts.tolist()])


# ------------------------------------------------------------------------------------------------------------ methods


class Denoising(Accelerated):
    """Before GaussianDiffusion."""

    library = "denoising-diffusion-pytorch"
    replaces = ("p_sample", "p_sample_loop", "ddim_sample", "interpolate", "q_sample", "p_losses")
    relies_on = (
        "model_predictions",
        "p_mean_variance",
        "q_posterior",
        "predict_start_from_noise",
        "predict_noise_from_start",
        "predict_start_from_v",
        "predict_v",
    )
    # the peer's
    model: Callable[..., Tensor]
    objective: str
    self_condition: bool
    num_timesteps: int
    sampling_timesteps: int
    ddim_sampling_eta: float
    offset_noise_strength: float
    device: torch.device
    unnormalize: Callable[[Tensor], Tensor]
    noise_assignment: Callable[[Tensor, Tensor], Tensor]
    _buffers: dict[str, Tensor]

    def _check(self) -> None:
        """Raises TypeError: an older version, some of whose methods do other things."""
        found = _library().__version__
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise TypeError(f"obj is of denoising-diffusion-pytorch {found}, expected {oldest} or later")

    # ----------------------------------------------------------------------------------------------------- what fits

    def _rows(self) -> _Tables | str:
        """Of the buffers as they are; or why there are none."""
        if torch.compiler.is_compiling():
            return "it is being compiled"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a transform of torch.func is at work"
        buffers = tuple([self._buffers[name] for name in BUFFERS])
        key = (self.objective, *map(version, buffers))
        plans = self.__dict__.setdefault("_plans", {})
        found = plans.get(key)
        if found is None:
            while len(plans) >= KEPT:
                del plans[next(iter(plans))]
            try:
                found = _Tables(buffers, self.objective)
            except KeyError:
                found = f"its objective is {self.objective!r}"
            except ValueError as error:
                found = f"its buffers make no rows: {error}"
            plans[key] = found
        return found

    def _fitting(self, method: str, dtype: torch.dtype, device: torch.device, why: str | None = None) -> _Tables | None:
        """The rows for such samples; None, which is said: they have no fused form, for `why` or another reason."""
        tables = why or self._rows()
        if isinstance(tables, str):
            return self._aside(method, tables)
        if dtype not in DTYPES:
            why = f"its samples are {_name(dtype)}"
        elif dtype not in tables.kept:  # what comes of them has more bits
            why = f"its samples are {_name(dtype)} and its buffers {_name(tables.dtype)}"
        elif device != tables.device or device.type not in ("cpu", "cuda"):
            why = f"its samples are on {device} and its buffers on {tables.device}, expected one CPU or CUDA device"
        return tables if why is None else self._aside(method, why)

    def _answering(self, output: Any, **attributes: Any) -> Any:
        """The peer's own object, whose model gives `output`."""
        plain = new(self._peer)
        plain.__dict__.update(self.__dict__, model=lambda *_: output, **attributes)
        return plain

    # --------------------------------------------------------------------------------------------------------- steps

    def _take(
        self, tables: StepDeviceTables, row: int, x: Tensor, output: Tensor, noisy: bool, with_x0: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The next sample and, where it is asked for, x_start."""
        noise: dict[str, Any] = {"add_noise": False}
        if noisy:
            rng = self.accelerated.rng
            noise = drawn(torch.randn_like(x), x) if rng is None else {"rng": rng}
        if not with_x0:
            return ops.reverse_step(x, output, tables.get("steps", x.device, torch.float32), row, **noise), None
        x0 = torch.empty_like(x)
        rows = tables.get("extended", x.device, torch.float32)
        return ops.extended_step(x, output, rows, row, x0_out=x0, **noise), x0

    def _p_sample(
        self, tables: _Tables, x: Tensor, t: int, times: Tensor, x_self_cond: Tensor | None, with_x0: bool
    ) -> tuple[Tensor, Tensor | None]:
        output = self.model(x, times, x_self_cond)
        # where objective is pred_x0, x_start has the output's dtype
        why = output_misfit(x, output, narrow=self.objective != "pred_x0")
        if why is not None:
            self._aside("p_sample", why)
            return self._answering(output).p_sample(x, t, x_self_cond)
        return self._take(tables.steps, t, x, output, t > 0, with_x0)

    @torch.inference_mode()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        step = _index(t)
        tables = self._fitting("p_sample", x.dtype, x.device, misfit(x))
        if tables is None or not 0 <= step < len(tables.steps):
            return super().p_sample(x, t, x_self_cond)  # type: ignore[misc]
        times = torch.full((len(x),), step, device=x.device)
        return self._p_sample(tables, x, step, times, x_self_cond, with_x0=True)

    # --------------------------------------------------------------------------------------------------------- loops

    def _start(self, shape: Any) -> Tensor:
        rng = self.accelerated.start()
        if rng is None:
            return torch.randn(shape, device=self.device)
        return randn(shape, rng, device=self.device, dtype=torch.get_default_dtype())

    def _descend(self, tables: _Tables, img: Tensor, start: int, what: str, imgs: list[Tensor] | None = None) -> Tensor:
        """From timestep start - 1 to the end."""
        x_start = None
        # each step's timesteps at once: the model gets a row of them
        times = tables.steps.timesteps(img.device)[:start, None].repeat(1, len(img))
        for t in _library().tqdm(reversed(range(0, start)), desc=what, total=start):
            self_cond = x_start if self.self_condition else None
            img, x_start = self._p_sample(tables, img, t, times[t], self_cond, with_x0=self.self_condition)
            if imgs is not None:
                imgs.append(img)
        return img

    @torch.inference_mode()
    def p_sample_loop(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        tables = self._fitting("p_sample_loop", torch.get_default_dtype(), self.device)
        if tables is None or not 0 < self.num_timesteps <= len(tables.steps):
            return super().p_sample_loop(shape, return_all_timesteps=return_all_timesteps)  # type: ignore[misc]
        img = self._start(shape)
        imgs = [img] if return_all_timesteps else None
        img = self._descend(tables, img, self.num_timesteps, "sampling loop time step", imgs)
        return self.unnormalize(img if imgs is None else torch.stack(imgs, dim=1))

    @torch.inference_mode()
    def ddim_sample(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        tables = self._fitting("ddim_sample", torch.get_default_dtype(), self.device)
        plan: _Ddim | str | None = None
        if tables is not None:
            plan = tables.ddim(self.num_timesteps, self.sampling_timesteps, self.ddim_sampling_eta)
        if not isinstance(plan, _Ddim):
            self._aside("ddim_sample", plan)
            return super().ddim_sample(shape, return_all_timesteps=return_all_timesteps)  # type: ignore[misc]
        img = self._start(shape)
        imgs = [img]
        x_start = None
        times = plan.tables.timesteps(img.device)[:, None].repeat(1, len(img))
        for row, (_, after) in enumerate(_library().tqdm(plan.pairs, desc="sampling loop time step")):
            x_self_cond = x_start if self.self_condition else None
            output = self.model(img, times[row], x_self_cond)
            why = output_misfit(img, output, narrow=self.objective != "pred_x0")
            if why is None:
                img, x_start = self._take(plan.tables, row, img, output, after >= 0, with_x0=self.self_condition)
            else:
                self._aside("ddim_sample", why)
                img, x_start = self._ddim_aside(img, output, times[row], plan.parts[row], noisy=after >= 0)
            if return_all_timesteps:
                imgs.append(img)
        return self.unnormalize(torch.stack(imgs, dim=1) if return_all_timesteps else img)

    def _ddim_aside(
        self, img: Tensor, output: Any, times: Tensor, parts: tuple[float, float, float], noisy: bool
    ) -> tuple[Tensor, Tensor]:
        """A step whose arithmetic is torch's."""
        pred_noise, x_start = self._answering(output).model_predictions(
            img, times, clip_x_start=True, rederive_pred_noise=True
        )
        if not noisy:
            return x_start, x_start
        of_start, of_noise, deviation = parts
        return x_start * of_start + of_noise * pred_noise + deviation * torch.randn_like(img), x_start

    @torch.inference_mode()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        start = self.num_timesteps - 1 if t is None else _index(t)
        tables = self._fitting("interpolate", x1.dtype, x1.device, _misfit(x1, x2))
        if tables is None or not 0 <= start < len(tables.steps):
            return super().interpolate(x1, x2, t=t, lam=lam)  # type: ignore[misc]
        times = torch.full((len(x1),), start, device=x1.device)
        rng = self.accelerated.rng
        noised = []
        for draw, x in enumerate((x1, x2)):
            noise = torch.randn_like(x) if rng is None else None
            own = None if rng is None else rng.of(STREAM_START, draw)
            noised.append(self._noised(tables, x, times, noise, own))
        img = (1 - lam) * noised[0] + lam * noised[1]
        return self._descend(tables, img, start, "interpolation sample time step")

    # ------------------------------------------------------------------------------------------------------ training

    def _noised(self, tables: _Tables, x: Tensor, t: Tensor, noise: Tensor | None, rng: Philox | None) -> Tensor:
        if getattr(self, "immiscible", False):  # older versions know none
            if noise is None:
                noise = randn(x.shape, rng, device=x.device, dtype=x.dtype)
            noise, rng = noise[self.noise_assignment(x, noise)], None
        rows = tables.steps.get("q_sample", x.device, torch.float32)
        return ops.forward_process(x, rows, t, noise=noise, rng=rng)

    def _training_noise(self, x: Tensor) -> tuple[Tensor | None, Philox | None]:
        rng = self.accelerated.next_forward()
        return (torch.randn_like(x), None) if rng is None else (None, rng)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        why = _misfit(x_start, noise) or _t_misfit(t, x_start)
        tables = self._fitting("q_sample", x_start.dtype, x_start.device, why)
        if tables is None:
            return super().q_sample(x_start, t, noise=noise)  # type: ignore[misc]
        rng = None
        if noise is None:
            noise, rng = self._training_noise(x_start)
        return self._noised(tables, x_start, t, noise, rng)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        # older versions know none
        reduction = {} if loss_reduction == "mean" else {"loss_reduction": loss_reduction}
        why = _misfit(x_start, noise) or _t_misfit(t, x_start)
        if why is None and wants_gradient(x_start, noise):
            why = "a gradient by images or noise is asked for"
        tables = self._fitting("p_losses", x_start.dtype, x_start.device, why)
        if tables is None or x_start.dim() != 4:
            return super().p_losses(x_start, t, noise, offset_noise_strength, **reduction)  # type: ignore[misc]
        rng = None
        if noise is None:
            noise, rng = self._training_noise(x_start)
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            noise, rng = self._offset(x_start, noise, rng, strength), None

        x = self._noised(tables, x_start, t, noise, rng)
        x_self_cond = None
        if self.self_condition and _library().random() < 0.5:
            with torch.no_grad():
                x_self_cond = self._predict_start(tables, x, t)
        output = self.model(x, t, x_self_cond)

        why = output_misfit(x, output)
        if why is not None:
            self._aside("p_losses", why)
            if noise is None:
                noise = randn(x.shape, rng, device=x.device, dtype=x.dtype)
            plain = self._answering(output, self_condition=False, immiscible=False, offset_noise_strength=0.0)
            return plain.p_losses(x_start, t, noise, **reduction)
        loss = ops.diffusion_loss(
            output,
            None if self.objective == "pred_noise" else x_start,
            tables.steps.get("loss", x.device, torch.float32),
            t,
            noise=noise,
            rng=rng,
            reduction="none" if loss_reduction == "none" else "mean",
        )
        if x.dtype in LOW and not torch.is_autocast_enabled(x.device.type):  # the loss is float32 there
            loss = loss.to(x.dtype)
        return loss

    def _offset(self, x: Tensor, noise: Tensor | None, rng: Philox | None, strength: float) -> Tensor:
        """The noise with a normal a channel more: noise that is given is written to, as the peer does."""
        if noise is None:
            noise = randn(x.shape, rng, device=x.device, dtype=x.dtype)
        elif rng is None:
            rng = self.accelerated.next_forward()
        sizes = x.shape[:2]
        if rng is None:
            moves = torch.randn(sizes, device=self.device)
        else:
            moves = randn(sizes, rng.of(STREAM_OFFSET, rng.draw), device=self.device)
        noise += strength * moves[:, :, None, None]
        return noise

    def _predict_start(self, tables: _Tables, x: Tensor, t: Tensor) -> Tensor:
        """For self-conditioning, not clipped."""
        output = self.model(x, t, None)
        if self.objective == "pred_x0":
            return output.detach()
        why = output_misfit(x, output)
        if why is not None:
            self._aside("p_losses", why)
            return self._answering(output).model_predictions(x, t).pred_x_start
        return ops.predict_start(x, output, tables.steps.get("start", x.device, torch.float32), t)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _misfit(x: Tensor, other: Tensor | None) -> str | None:
    why = misfit(x, other)
    if why is None and other is not None and other.dtype != x.dtype:
        why = f"its tensors are {_name(x.dtype)} and {_name(other.dtype)}"
    return why


def _index(t: Any) -> int:
    """t as an int; -1: it is none."""
    try:
        return operator.index(t)
    except TypeError:
        return -1


def _t_misfit(t: Any, x: Tensor) -> str | None:
    if isinstance(t, Tensor) and t.dtype == torch.int64 and t.shape == x.shape[:1] and t.device == x.device:
        return None
    return "t is not one int64 timestep a sample"
