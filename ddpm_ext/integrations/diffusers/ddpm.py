"""diffusers' DDPMScheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.diffusers.forward import Forward
from ddpm_ext.integrations.diffusers.scheduler import (
    PREDICTIONS,
    Plan,
    Threshold,
    clip_of,
    imported,
    jumps,
    plan_of,
    result_dtype,
    tensors,
)
from ddpm_ext.integrations.registry import Support
from ddpm_ext.tables.samplers import ddpm

__all__ = ["DDPM", "SUPPORT"]

# "learned" is a variance here; fixed_small_log hands out the standard deviation of fixed_small.
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned": "learned_variance",
    "learned_range": "learned_range",
}

SUPPORT = (
    Support(
        "DDPMScheduler",
        "step",
        "every prediction_type; variance_type fixed_small, fixed_small_log, fixed_large, learned, learned_range; "
        "clip_sample, thresholding; any timesteps",
        "variance_type fixed_large_log, and steps to more noise (NaN there); epsilon without a clip at alphas_cumprod "
        "0; sample_max_value below 1; float64; gradients",
    ),
    Support(
        "DDPMScheduler",
        "add_noise, get_velocity",
        "float32, float16, bfloat16; a timestep a sample, or one for all; gradients",
        "float64; samples that are broadcast",
    ),
)


def _plan(
    alphas_cumprod: Tensor,
    timesteps: Tensor | None,
    prediction_type: str,
    variance_type: str,
    clip: Clip | None,
    threshold: Threshold | None,
) -> Plan:
    """timesteps: those of which a step goes on to the next; None: all."""
    if variance_type == "fixed_large_log":
        return Plan(why="variance_type is 'fixed_large_log'")
    if prediction_type not in PREDICTIONS or variance_type not in VARIANCES:
        return Plan()
    kept = alphas_cumprod.detach().cpu()
    t = torch.arange(len(kept) - 1, -1, -1) if timesteps is None else timesteps.detach().cpu()
    if len(t.unique()) < len(t):
        return Plan(why="its timesteps repeat")
    to = torch.cat([t[1:], t.new_tensor([-1])])
    usable = (t >= 0) & (t < len(kept)) & (to < len(kept))
    t, to = t[usable], to[usable]
    now, after = kept[t], torch.where(to >= 0, kept[to.clamp(min=0)], 1)
    usable = (now < 1) & (after > 0) & (now <= after)
    usable &= ~now.signbit()  # betas above 1 make such, and NaN there
    if prediction_type == "epsilon" and clip is None:
        usable &= now > 0
    steps = None
    if usable.any():
        grid = jumps(t[usable], now[usable], after[usable])
        steps = ddpm(grid, prediction=PREDICTIONS[prediction_type], variance=VARIANCES[variance_type])
    return plan_of(steps, clip, threshold, timesteps=len(kept), unfused=t[~usable])


class DDPM(Forward):
    """Before DDPMScheduler."""

    replaces = ("step", "add_noise", "get_velocity")
    relies_on = ("_get_variance", "_threshold_sample", "previous_timestep")
    alphas_cumprod: Tensor
    variance_type: str
    custom_timesteps: bool
    num_inference_steps: int | None

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        done = self._step(model_output, timestep, sample, generator)
        if done is None:
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        if not return_dict:
            return done
        return imported("schedulers.scheduling_ddpm", "DDPMSchedulerOutput")(*done)

    def _step(self, model_output: Any, timestep: Any, sample: Any, generator: Any) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if self.variance_type != config.variance_type:
            return self._aside("step", "variance_type is not its config's")
        plan = self._plan(
            _plan,
            self.alphas_cumprod,
            self.timesteps if self.custom_timesteps or self.num_inference_steps else None,
            config.prediction_type,
            self.variance_type,
            *clip_of(config),
        )
        if not tensors(sample, model_output) or min(sample.dim(), model_output.dim()) < 2:
            return None
        t, row = self._row(plan, timestep)
        if row < 0:
            return self._aside("step", plan.why_not(row))
        extras: dict[str, Any] = {}
        if self.variance_type in ("learned", "learned_range"):
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                return None
            extras = {
                "model_variance": model_output[:, channels:],
                "log_variance": self.variance_type == "learned_range",
            }
            model_output = model_output[:, :channels]
        why = self._misfit(sample, model_output, timestep=timestep)
        if why is not None:
            return self._aside("step", why)
        sample = sample.to(result_dtype(model_output, sample))
        noise = self._noise(t > 0, model_output, generator, sample)
        return self._take(plan, row, sample, model_output, noise, **extras)
