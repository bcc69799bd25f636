"""denoising-diffusion-pytorch's GaussianDiffusion: a step of its loops in one launch, its training loss in two.

Its callers see images in [0, 1]; inside they are in [-1, 1]. The library's own code converts them, where sample ends
and forward begins.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.denoising_tables import BUFFERS, DTYPES, LOW, DdimSteps, DenoisingTables
from ddpm_ext.integrations.fallback import Fallback, attempt, result_of, with_fallback
from ddpm_ext.integrations.shared import Accelerated, Support, new
from ddpm_ext.integrations.tensors import (
    TRANSFORMED,
    check_tensors,
    dtype_name,
    noise_arguments,
    version,
    wants_gradient,
)
from ddpm_ext.integrations.tutorial import check_output
from ddpm_ext.ops.noise import STREAM_OFFSET, STREAM_START, Philox, randn
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.tables.on_device import StepDeviceTables

__all__ = ["SUPPORT", "Denoising"]

SUPPORT = tuple(
    Support("denoising_diffusion_pytorch", *row)
    for row in (
        (
            "p_sample",
            "float32, and 16 bits where the buffers have them; every objective; self-conditioning; a model's output of "
            "16 bits, except for pred_x0",
            "float64; samples of fewer bits than the buffers; a model's output of another shape",
        ),
        ("p_sample_loop", "as p_sample; return_all_timesteps", "as p_sample"),
        (
            "ddim_sample",
            "as p_sample; sampling_timesteps, ddim_sampling_eta, return_all_timesteps",
            "as p_sample; an eta that is negative, or asks for more noise than there is",
        ),
        ("sample", "its loop: p_sample_loop or ddim_sample", "as p_sample"),
        ("interpolate", "as p_sample; t, lam", "as p_sample; images of two dtypes"),
        ("q_sample", "as p_sample, with gradients; immiscible", "as p_sample; torch.compile; torch.func"),
        (
            "p_losses, forward",
            "as q_sample; every objective and loss_weight; offset noise; loss_reduction; autocast; the library always "
            "draws the timesteps and whether to self-condition; a second derivative is refused",
            "as q_sample; gradients by images or noise",
        ),
        ("all others", "", "all"),
    )
)

OLDEST = (1, 10)
CACHED = 4  # states of the buffers: replicas on several devices share an object's cache


def _library() -> Any:
    """The peer's module: its progress bar and its random number are looked up where they are used."""
    return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


class Denoising(Accelerated):
    """Mixin placed before GaussianDiffusion in the bases."""

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
        """Raises TypeError for an older version, some of whose methods do other things."""
        found = _library().__version__
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise TypeError(f"obj is of denoising-diffusion-pytorch {found}, expected {oldest} or later")

    # ----------------------------------------------------------------------------------------------------- what fits

    def _fused_tables(self, dtype: torch.dtype, device: torch.device) -> DenoisingTables:
        """The rows of the buffers as they are. Raises Fallback where there are none for samples of such a dtype."""
        tables = self._tables_of_buffers()
        if dtype not in DTYPES:
            raise Fallback(f"its samples are {dtype_name(dtype)}")
        if dtype not in tables.sample_dtypes:  # the results have more bits
            raise Fallback(f"its samples are {dtype_name(dtype)} and its buffers {dtype_name(tables.dtype)}")
        if device != tables.device or device.type not in ("cpu", "cuda"):
            raise Fallback(
                f"its samples are on {device} and its buffers on {tables.device}, expected one CPU or CUDA device"
            )
        return tables

    def _tables_of_buffers(self) -> DenoisingTables:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise Fallback(TRANSFORMED)
        buffers = tuple([self._buffers[name] for name in BUFFERS])
        key = (self.objective, *map(version, buffers))
        cache: BoundedCache[Any] | None = self.__dict__.get("_fused_cache")
        if cache is None:
            cache = self.__dict__.setdefault("_fused_cache", BoundedCache(CACHED))
        found = cache.get(key)
        if found is None:
            # The buffers are stored, too, so that no other tensors get their identities.
            found = cache.get_or_make(key, lambda: (attempt(DenoisingTables, buffers, self.objective), buffers))
        return result_of(found[0])

    def _returning(self, output: Any, **attributes: Any) -> Any:
        """The peer's own object with a model that returns `output`."""
        plain = new(self._peer)
        plain.__dict__.update(self.__dict__, model=lambda *_: output, **attributes)
        return plain

    # --------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    @with_fallback(compiles=False)
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        check_tensors(x)
        tables, step = self._fused_tables(x.dtype, x.device), _index(t)
        if not 0 <= step < len(tables.steps):
            raise Fallback
        times = torch.full((len(x),), step, device=x.device)
        rng = self.accelerated.rng_of_step(len(x), -step) if step > 0 else None
        return self._p_sample(tables, x, step, times, x_self_cond, rng, with_x0=True)

    @with_fallback("p_sample")
    def _p_sample(
        self,
        tables: DenoisingTables,
        x: Tensor,
        t: int,
        times: Tensor,
        x_self_cond: Tensor | None,
        rng: Philox | None,
        with_x0: bool,
    ) -> tuple[Tensor, Tensor | None]:
        output = self.model(x, times, x_self_cond)
        self._check_output(x, output, lambda: self._returning(output).p_sample(x, t, x_self_cond))
        return self._take(tables.steps, t, x, output, t > 0, rng, with_x0)

    def _check_output(self, x: Tensor, output: Any, instead: Callable[[], Any]) -> None:
        # With the objective pred_x0, x_start has the output's dtype.
        check_output(x, output, instead, allow_16_bits=self.objective != "pred_x0")

    def _take(
        self,
        tables: StepDeviceTables,
        row: int,
        x: Tensor,
        output: Tensor,
        noisy: bool,
        rng: Philox | None,
        with_x0: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The next sample, and x_start where it is asked for."""
        noise: dict[str, Any] = {"add_noise": False}
        if noisy:
            noise = noise_arguments(torch.randn_like(x), x) if rng is None else {"rng": rng}
        if not with_x0:
            return ops.reverse_step(x, output, tables.get("steps", x.device, torch.float32), row, **noise), None
        x0 = empty_like(x)
        rows = tables.get("extended", x.device, torch.float32)
        return ops.extended_step(x, output, rows, row, x0_out=x0, **noise), x0

    # --------------------------------------------------------------------------------------------------------- loops

    def _start(self, shape: Any) -> tuple[Tensor, Philox | None]:
        """The noise that a loop starts from, and the generator of its steps' noise."""
        rng = self.accelerated.whole_loop(shape[0])
        if rng is None:
            return torch.randn(shape, device=self.device), None
        start = randn(shape, rng, stream=STREAM_START, device=self.device, dtype=torch.get_default_dtype())
        return start, rng

    def _descend(
        self,
        tables: DenoisingTables,
        img: Tensor,
        start: int,
        bar: str,
        rng: Philox | None,
        imgs: list[Tensor] | None = None,
    ) -> Tensor:
        """From timestep start - 1 to the end, with a progress bar."""
        x_start = None
        # Each step's timesteps are made at once: the model gets a row of them.
        times = tables.steps.timesteps(img.device)[:start, None].repeat(1, len(img))
        for t in _library().tqdm(reversed(range(0, start)), desc=bar, total=start):
            self_cond = x_start if self.self_condition else None
            img, x_start = self._p_sample(tables, img, t, times[t], self_cond, rng, with_x0=self.self_condition)
            if imgs is not None:
                imgs.append(img)
        return img

    @torch.inference_mode()
    @with_fallback(compiles=False)
    def p_sample_loop(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        tables = self._fused_tables(torch.get_default_dtype(), self.device)
        if not 0 < self.num_timesteps <= len(tables.steps):
            raise Fallback
        img, rng = self._start(shape)
        imgs = [img] if return_all_timesteps else None
        img = self._descend(tables, img, self.num_timesteps, "sampling loop time step", rng, imgs)
        return self.unnormalize(img if imgs is None else torch.stack(imgs, dim=1))

    @torch.inference_mode()
    @with_fallback(compiles=False)
    def ddim_sample(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        tables = self._fused_tables(torch.get_default_dtype(), self.device)
        steps = tables.ddim(self.num_timesteps, self.sampling_timesteps, self.ddim_sampling_eta)
        img, rng = self._start(shape)
        imgs = [img]
        x_start = None
        times = steps.tables.timesteps(img.device)[:, None].repeat(1, len(img))
        for row, _ in enumerate(_library().tqdm(steps.pairs, desc="sampling loop time step")):
            x_self_cond = x_start if self.self_condition else None
            img, x_start = self._ddim_step(steps, row, img, times[row], x_self_cond, rng)
            if return_all_timesteps:
                imgs.append(img)
        return self.unnormalize(torch.stack(imgs, dim=1) if return_all_timesteps else img)

    @with_fallback("ddim_sample")
    def _ddim_step(
        self,
        steps: DdimSteps,
        row: int,
        img: Tensor,
        times: Tensor,
        x_self_cond: Tensor | None,
        rng: Philox | None,
    ) -> tuple[Tensor, Tensor | None]:
        output = self.model(img, times, x_self_cond)
        noisy = steps.pairs[row][1] >= 0
        self._check_output(img, output, lambda: self._own_ddim_step(img, output, times, steps.weights[row], noisy))
        return self._take(steps.tables, row, img, output, noisy, rng, with_x0=self.self_condition)

    def _own_ddim_step(
        self, img: Tensor, output: Any, times: Tensor, weights: tuple[float, float, float], noisy: bool
    ) -> tuple[Tensor, Tensor]:
        """A step by the library's predictions and torch's arithmetic."""
        pred_noise, x_start = self._returning(output).model_predictions(
            img, times, clip_x_start=True, rederive_pred_noise=True
        )
        if not noisy:
            return x_start, x_start
        of_start, of_noise, deviation = weights
        return x_start * of_start + of_noise * pred_noise + deviation * torch.randn_like(img), x_start

    @torch.inference_mode()
    @with_fallback(compiles=False)
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        start = self.num_timesteps - 1 if t is None else _index(t)
        _check_pair(x1, x2)
        tables = self._fused_tables(x1.dtype, x1.device)
        if not 0 <= start < len(tables.steps):
            raise Fallback
        times = torch.full((len(x1),), start, device=x1.device)
        rng = self.accelerated.whole_loop(len(x1))
        noised = []
        for draw, x in enumerate((x1, x2)):
            noise = torch.randn_like(x) if rng is None else None
            own = None if rng is None else rng.of(STREAM_START, draw)
            noised.append(self._noised(tables, x, times, noise, own))
        img = (1 - lam) * noised[0] + lam * noised[1]
        return self._descend(tables, img, start, "interpolation sample time step", rng)

    # ------------------------------------------------------------------------------------------------------ training

    def _noised(
        self, tables: DenoisingTables, x: Tensor, t: Tensor, noise: Tensor | None, rng: Philox | None
    ) -> Tensor:
        if getattr(self, "immiscible", False):  # older versions don't have it
            if noise is None:
                noise = randn(x.shape, rng, device=x.device, dtype=x.dtype)
            noise, rng = noise[self.noise_assignment(x, noise)], None
        rows = tables.steps.get("q_sample", x.device, torch.float32)
        return ops.forward_process(x, rows, t, noise=noise, rng=rng)

    def _training_noise(self, x: Tensor) -> tuple[Tensor | None, Philox | None]:
        rng = self.accelerated.next_forward(x.device)
        return (torch.randn_like(x), None) if rng is None else (None, rng)

    @with_fallback(compiles=False)
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        _check_pair(x_start, noise)
        _check_timesteps(t, x_start)
        tables = self._fused_tables(x_start.dtype, x_start.device)
        rng = None
        if noise is None:
            noise, rng = self._training_noise(x_start)
        return self._noised(tables, x_start, t, noise, rng)

    @with_fallback(compiles=False)
    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        _check_pair(x_start, noise)
        _check_timesteps(t, x_start)
        if wants_gradient(x_start, noise):
            raise Fallback("a gradient by images or noise is asked for")
        tables = self._fused_tables(x_start.dtype, x_start.device)
        if x_start.dim() != 4:
            raise Fallback
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

        def own_loss() -> Tensor:
            z = randn(x.shape, rng, device=x.device, dtype=x.dtype) if noise is None else noise
            plain = self._returning(output, self_condition=False, immiscible=False, offset_noise_strength=0.0)
            # Older versions don't have loss_reduction.
            reduction = {} if loss_reduction == "mean" else {"loss_reduction": loss_reduction}
            return plain.p_losses(x_start, t, z, **reduction)

        check_output(x, output, own_loss)
        loss = ops.diffusion_loss(
            output,
            None if self.objective == "pred_noise" else x_start,
            tables.steps.get("loss", x.device, torch.float32),
            t,
            noise=noise,
            rng=rng,
            reduction="none" if loss_reduction == "none" else "mean",
        )
        if x.dtype in LOW and not torch.is_autocast_enabled(x.device.type):  # the operator's loss is float32
            loss = loss.to(x.dtype)
        return loss

    def _offset(self, x: Tensor, noise: Tensor | None, rng: Philox | None, strength: float) -> Tensor:
        """The noise, to which each channel adds one more normal. A given noise is written to, as the peer does."""
        if noise is None:
            noise = randn(x.shape, rng, device=x.device, dtype=x.dtype)
        elif rng is None:
            rng = self.accelerated.next_forward(x.device)
        sizes = x.shape[:2]
        if rng is None:
            offsets = torch.randn(sizes, device=self.device)
        else:
            offsets = randn(sizes, rng.of(STREAM_OFFSET, rng.draw), device=self.device)
        noise += strength * offsets[:, :, None, None]
        return noise

    @with_fallback("p_losses")
    def _predict_start(self, tables: DenoisingTables, x: Tensor, t: Tensor) -> Tensor:
        """The predicted clean sample for self-conditioning, which is not clipped."""
        output = self.model(x, t, None)
        if self.objective == "pred_x0":
            return output.detach()
        check_output(x, output, lambda: self._returning(output).model_predictions(x, t).pred_x_start)
        return ops.predict_start(x, output, tables.steps.get("start", x.device, torch.float32), t)


def _check_pair(x: Tensor, other: Tensor | None) -> None:
    """Raises Fallback where the operators can't take x and another tensor of its shape and dtype."""
    check_tensors(x, other)
    if other is not None and other.dtype != x.dtype:
        raise Fallback(f"its tensors are {dtype_name(x.dtype)} and {dtype_name(other.dtype)}")


def _check_timesteps(t: Any, x: Tensor) -> None:
    if not (isinstance(t, Tensor) and t.dtype == torch.int64 and t.shape == x.shape[:1] and t.device == x.device):
        raise Fallback("t is not one int64 timestep a sample")


def _index(t: Any) -> int:
    """t as an int, or -1 where it is none."""
    try:
        return operator.index(t)
    except TypeError:
        return -1
