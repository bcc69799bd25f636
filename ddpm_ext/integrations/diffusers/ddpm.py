"""diffusers' DDPMScheduler.

It has a mixin of its own for the variances that a model learns, which no row of numbers has. Beside that, any timestep
may come after any other, as in ddim.py.
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
from ddpm_ext.tables.samplers import ddpm
from ddpm_ext.tables.variances import peer_variances

__all__ = ["DDPM", "SUPPORT"]

VARIANCES = peer_variances("diffusers")

SUPPORT = (
    Support(
        "DDPMScheduler",
        "step",
        "every prediction_type; variance_type fixed_small, fixed_small_log, fixed_large, learned, learned_range; "
        "clip_sample, thresholding; any timesteps",
        "variance_type fixed_large_log; steps to more noise, where diffusers returns NaN; epsilon without a clip where "
        "alphas_cumprod is 0; sample_max_value below 1; float64; gradients",
    ),
    Support(
        "DDPMScheduler",
        "add_noise, get_velocity",
        "float32, float16, bfloat16; a timestep a sample, or one for all; gradients",
        "float64; samples that are broadcast",
    ),
)


def _make(
    alphas_cumprod: Tensor,
    timesteps: Tensor | None,
    prediction_type: str,
    variance_type: str,
    clip: Clip | None,
    threshold: Threshold | None,
) -> FusedRows:
    """timesteps: those of the loop, each of whose steps leads to the next one; None: all of the schedule."""
    if variance_type == "fixed_large_log":  # diffusers takes the square root of a logarithm
        raise Fallback("variance_type is 'fixed_large_log'")
    # "learned_log" is what ddpm_ext writes for its "learned", and no type of diffusers, which rejects it.
    if prediction_type not in PREDICTIONS or variance_type not in VARIANCES or variance_type == "learned_log":
        raise Fallback
    levels = alphas_cumprod.detach().cpu()
    t = torch.arange(len(levels) - 1, -1, -1, device="cpu") if timesteps is None else timesteps.detach().cpu()
    if len(t.unique()) < len(t):
        raise Fallback("its timesteps repeat")
    to = torch.cat([t[1:], t.new_tensor([-1])])
    in_range = (t >= 0) & (t < len(levels)) & (to < len(levels))
    t, to = t[in_range], to[in_range]
    now, after = levels[t], torch.where(to >= 0, levels[to.clamp(min=0)], 1)
    fused = (now < 1) & (after > 0) & (now <= after)
    fused &= ~now.signbit()  # betas above 1 make negative levels, where diffusers returns NaN
    if prediction_type == "epsilon" and clip is None:
        fused &= now > 0
    steps = None
    if fused.any():
        grid = jumps(t[fused], now[fused], after[fused])
        steps = ddpm(grid, prediction=PREDICTIONS[prediction_type], variance=VARIANCES[variance_type])
    return make_rows(steps, clip, threshold, timesteps=len(levels), unfused=t[~fused])


class DDPM(Forward):
    """Mixin placed before DDPMScheduler in the bases; replaces step, add_noise and get_velocity."""

    replaces = ("step", "add_noise", "get_velocity")
    relies_on = ("_get_variance", "_threshold_sample", "previous_timestep")
    variance_type: str
    custom_timesteps: bool
    num_inference_steps: int | None

    @with_fallback()
    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        config = self.config
        if self.variance_type != config.variance_type:
            raise Fallback("variance_type is not its config's")
        if not are_tensors(sample, model_output) or min(sample.dim(), model_output.dim()) < 2:
            raise Fallback
        rows = self._rows(
            _make,
            self.alphas_cumprod,
            self.timesteps if self.custom_timesteps or self.num_inference_steps else None,
            config.prediction_type,
            self.variance_type,
            *clip_of(config),
        )
        t, row = self._row(rows, timestep)
        extras: dict[str, Any] = {}
        if self.variance_type in ("learned", "learned_range"):
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                raise Fallback
            extras = {
                "model_variance": model_output[:, channels:],
                "log_variance": self.variance_type == "learned_range",
            }
            model_output = model_output[:, :channels]
        self._check_step(sample, model_output, timestep=timestep)
        sample = sample.to(result_dtype(model_output, sample))
        noise = self._noise(t > 0, model_output, generator, sample, -t)
        done = self._take(rows, row, sample, model_output, noise, **extras)
        return imported("schedulers.scheduling_ddpm", "DDPMSchedulerOutput")(*done) if return_dict else done
