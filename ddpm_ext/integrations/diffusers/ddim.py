"""diffusers' DDIMScheduler and DDIMInverseScheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.diffusers.forward import Forward
from ddpm_ext.integrations.diffusers.scheduler import (
    PREDICTIONS,
    Plan,
    Scheduler,
    Threshold,
    clip_of,
    imported,
    jumps,
    plan_of,
    result_dtype,
    tensors,
)
from ddpm_ext.integrations.registry import Support
from ddpm_ext.tables.samplers import ddim

__all__ = ["DDIM", "SUPPORT", "DDIMInverse"]

SUPPORT = (
    Support(
        "DDIMScheduler",
        "step",
        "every prediction_type; eta up to 1; use_clipped_model_output; variance_noise; clip_sample, thresholding; "
        "set_alpha_to_one; any timestep",
        "eta above 1, and steps to more noise (NaN there); epsilon without a clip at alphas_cumprod 0; "
        "sample_max_value below 1; variance_noise with more digits than the samples; float64; gradients",
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
        "sample and clean data as its start; float64; gradients",
    ),
)


def _plan(
    alphas_cumprod: Tensor,
    end: Tensor | float,
    stride: int,
    prediction_type: str,
    eta: float,
    keep_eps: bool,
    clip: Clip | None,
    threshold: Threshold | None,
) -> Plan:
    """Steps from each timestep to the one `stride` below, or above where it is negative: then a step's number is the
    timestep that it arrives at. end: alphas_cumprod below 0."""
    if prediction_type not in PREDICTIONS:
        return Plan()
    if not 0 <= eta <= 1:
        return Plan(why=f"eta is {eta}")
    kept, end = alphas_cumprod.detach().cpu(), torch.as_tensor(end).detach().cpu()
    t = torch.arange(len(kept))
    other = t - abs(stride)
    below = torch.where(other >= 0, kept[other.clamp(min=0)], end.to(kept.dtype))
    now, after = (kept, below) if stride > 0 else (below, kept)
    usable = (now < 1) & ((after > 0) | (eta == 0))  # else a sample and its x0 don't tell eps
    if prediction_type != "sample" and keep_eps and not eta:
        usable |= after < 1
    usable &= ~(now.signbit() | after.signbit())  # betas above 1 make such, and NaN there
    if stride > 0:
        usable &= now <= after  # else a variance is negative, and its root NaN with any eta
    if prediction_type == "epsilon" and clip is None:
        usable &= now > 0
    steps = None
    if usable.any():
        grid = jumps(t[usable], now[usable], after[usable])
        steps = ddim(grid, prediction=PREDICTIONS[prediction_type], eta=eta, keep_eps=keep_eps)
    return plan_of(steps, clip, threshold, timesteps=len(kept), unfused=t[~usable])


class DDIM(Forward):
    """Before DDIMScheduler."""

    replaces = ("step", "add_noise", "get_velocity")
    relies_on = ("_get_variance", "_threshold_sample")
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    num_inference_steps: int | None

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
        done = self._step(model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise)
        if done is None:
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        if not return_dict:
            return done
        return imported("schedulers.scheduling_ddim", "DDIMSchedulerOutput")(*done)

    def _step(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        eta: Any,
        use_clipped_model_output: Any,
        generator: Any,
        variance_noise: Any,
    ) -> tuple[Tensor, Tensor] | None:
        config = self.config
        noisy = eta > 0
        if (
            self.num_inference_steps is None
            or not tensors(sample, model_output)
            or (noisy and variance_noise is not None and generator is not None)
        ):
            return None
        plan = self._plan(
            _plan,
            self.alphas_cumprod,
            self.final_alpha_cumprod,
            config.num_train_timesteps // self.num_inference_steps,
            config.prediction_type,
            float(eta),
            not use_clipped_model_output,
            *clip_of(config),
        )
        _, row = self._row(plan, timestep)
        variance_noise = variance_noise if noisy else None
        if row < 0:
            return self._aside("step", plan.why_not(row))
        why = self._misfit(sample, model_output, variance_noise, timestep=timestep)
        if why is not None:
            return self._aside("step", why)
        sample = sample.to(result_dtype(model_output, sample))
        if variance_noise is not None:
            real = variance_noise.is_floating_point()
            if not real or torch.promote_types(variance_noise.dtype, sample.dtype) != sample.dtype:
                return self._aside("step", f"variance_noise is {str(variance_noise.dtype).removeprefix('torch.')}")
            noise: dict[str, Any] = {"noise": variance_noise.to(sample.dtype)}
        else:
            noise = self._noise(noisy, model_output, generator, sample)
        return self._take(plan, row, sample, model_output, noise)


class DDIMInverse(Scheduler):
    """Before DDIMInverseScheduler."""

    replaces = ("step",)
    alphas_cumprod: Tensor
    initial_alpha_cumprod: Tensor
    num_inference_steps: int | None

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        done = self._step(model_output, timestep, sample)
        if done is None:
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]
        if not return_dict:
            return done
        return imported("schedulers.scheduling_ddim_inverse", "DDIMSchedulerOutput")(*done)

    def _step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if self.num_inference_steps is None or not tensors(sample, model_output):
            return None
        bound = config.clip_sample_range
        plan = self._plan(
            _plan,
            self.alphas_cumprod,
            self.initial_alpha_cumprod,
            -(config.num_train_timesteps // self.num_inference_steps),
            config.prediction_type,
            0.0,
            True,
            (-bound, bound) if config.clip_sample else None,
            None,
        )
        _, row = self._row(plan, timestep)
        if row < 0:
            return self._aside("step", plan.why_not(row))
        why = self._misfit(sample, model_output, timestep=timestep)
        if why is not None:
            return self._aside("step", why)
        sample = sample.to(result_dtype(model_output, sample))
        return self._take(plan, row, sample, model_output, {"add_noise": False})
