"""diffusers' DDIMScheduler and DDIMInverseScheduler.

They have a mixin of their own because their steps need no loop: any timestep may come after any other, and a setting
may change in between. All timesteps' rows are there at once, where tracing would follow a loop anew from each step that
is out of turn, and leave a whole loop to diffusers where one step has no row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.diffusers.forward import Forward
from ddpm_ext.integrations.diffusers.scheduler import (
    PREDICTIONS,
    FusedRows,
    Scheduler,
    Threshold,
    are_tensors,
    clip_of,
    imported,
    jumps,
    make_rows,
    result_dtype,
)
from ddpm_ext.integrations.fallback import Fallback, with_fallback
from ddpm_ext.integrations.shared import Support
from ddpm_ext.integrations.tensors import dtype_name
from ddpm_ext.tables.samplers import ddim

__all__ = ["DDIM", "SUPPORT", "DDIMInverse"]

SUPPORT = (
    Support(
        "DDIMScheduler",
        "step",
        "every prediction_type; eta up to 1; use_clipped_model_output; variance_noise; clip_sample, thresholding; "
        "set_alpha_to_one; any timestep",
        "eta above 1; steps to more noise, where diffusers returns NaN; epsilon without a clip where alphas_cumprod "
        "is 0; sample_max_value below 1; variance_noise of a wider dtype than the samples; float64; gradients",
    ),
    Support(
        "DDIMScheduler",
        "add_noise, get_velocity",
        "float32, float16, bfloat16; a timestep a sample, or one for all; gradients",
        "float64; samples that are broadcast",
    ),
    Support(
        "DDIMInverseScheduler",
        "step",
        "every prediction_type; clip_sample; set_alpha_to_one",
        "sample where the loop starts from clean data; float64; gradients",
    ),
)


def _make(
    alphas_cumprod: Tensor,
    end: Tensor | float,
    stride: int,
    prediction_type: str,
    eta: float,
    keep_eps: bool,
    clip: Clip | None,
    threshold: Threshold | None,
) -> FusedRows:
    """Steps from each timestep t to t - stride. With a negative stride, that of t comes from t + stride instead.

    end: alphas_cumprod before timestep 0.
    """
    if prediction_type not in PREDICTIONS:
        raise Fallback
    if not 0 <= eta <= 1:
        raise Fallback(f"eta is {eta}")
    levels, end = alphas_cumprod.detach().cpu(), torch.as_tensor(end, device="cpu").detach()
    t = torch.arange(len(levels), device="cpu")
    other = t - abs(stride)
    below = torch.where(other >= 0, levels[other.clamp(min=0)], end.to(levels.dtype))
    now, after = (levels, below) if stride > 0 else (below, levels)
    fused = (now < 1) & ((after > 0) | (eta == 0))  # else eps does not follow from a sample and its x0
    if prediction_type != "sample" and keep_eps and not eta:
        fused |= after < 1
    fused &= ~(now.signbit() | after.signbit())  # betas above 1 make negative levels, where diffusers returns NaN
    if stride > 0:
        fused &= now <= after  # else the variance is negative and its root NaN, whatever eta is
    if prediction_type == "epsilon" and clip is None:
        fused &= now > 0
    steps = None
    if fused.any():
        grid = jumps(t[fused], now[fused], after[fused])
        steps = ddim(grid, prediction=PREDICTIONS[prediction_type], eta=eta, keep_eps=keep_eps)
    return make_rows(steps, clip, threshold, timesteps=len(levels), unfused=t[~fused])


class DDIM(Forward):
    """Mixin placed before DDIMScheduler in the bases; replaces step, add_noise and get_velocity."""

    replaces = ("step", "add_noise", "get_velocity")
    relies_on = ("_get_variance", "_threshold_sample")
    final_alpha_cumprod: Tensor
    num_inference_steps: int | None

    @with_fallback()
    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        config = self.config
        noisy = eta > 0
        if self.num_inference_steps is None or not are_tensors(sample, model_output):
            raise Fallback
        if noisy and variance_noise is not None and generator is not None:
            raise Fallback
        rows = self._rows(
            _make,
            self.alphas_cumprod,
            self.final_alpha_cumprod,
            config.num_train_timesteps // self.num_inference_steps,
            config.prediction_type,
            float(eta),
            not use_clipped_model_output,
            *clip_of(config),
        )
        t, row = self._row(rows, timestep)
        variance_noise = variance_noise if noisy else None
        self._check_step(sample, model_output, variance_noise, timestep=timestep)
        sample = sample.to(result_dtype(model_output, sample))
        if variance_noise is not None:
            real = variance_noise.is_floating_point()
            if not real or torch.promote_types(variance_noise.dtype, sample.dtype) != sample.dtype:
                raise Fallback(f"variance_noise is {dtype_name(variance_noise.dtype)}")
            noise: dict[str, Any] = {"noise": variance_noise.to(sample.dtype)}
        else:
            noise = self._noise(noisy, model_output, generator, sample, -t)
        done = self._take(rows, row, sample, model_output, noise)
        return imported("schedulers.scheduling_ddim", "DDIMSchedulerOutput")(*done) if return_dict else done


class DDIMInverse(Scheduler):
    """Mixin placed before DDIMInverseScheduler in the bases; replaces step."""

    replaces = ("step",)
    alphas_cumprod: Tensor
    initial_alpha_cumprod: Tensor
    num_inference_steps: int | None

    @with_fallback()
    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        config = self.config
        if self.num_inference_steps is None or not are_tensors(sample, model_output):
            raise Fallback
        bound = config.clip_sample_range
        rows = self._rows(
            _make,
            self.alphas_cumprod,
            self.initial_alpha_cumprod,
            -(config.num_train_timesteps // self.num_inference_steps),
            config.prediction_type,
            0.0,
            True,
            (-bound, bound) if config.clip_sample else None,
            None,
        )
        _, row = self._row(rows, timestep)
        self._check_step(sample, model_output, timestep=timestep)
        sample = sample.to(result_dtype(model_output, sample))
        done = self._take(rows, row, sample, model_output, {"add_noise": False})
        return imported("schedulers.scheduling_ddim_inverse", "DDIMSchedulerOutput")(*done) if return_dict else done
