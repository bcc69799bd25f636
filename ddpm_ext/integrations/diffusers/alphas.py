"""The mixins for diffusers' DDPMScheduler and DDIMScheduler, and the parallel version of each.

These schedulers are not traced like all others (traced.py), because their steps need no loop: any timestep may follow
any other, and settings may change between steps. The mixins create the rows of all timesteps at once. With tracing,
diffusers' code would take the steps at timesteps outside the loop and those after a change of the config, whole loops
with a step that has no row, and DDPM's learned variances.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.diffusers.forward import Forward
from ddpm_ext.integrations.diffusers.scheduler import FusedRows, are_tensors, clip_of, imported, make_rows, result_dtype
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.library_code import foreign_method
from ddpm_ext.integrations.proof import TRACE_HINT
from ddpm_ext.integrations.shared import Support
from ddpm_ext.integrations.tensors import dtype_name
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.grid import Jumps
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.samplers import ddim, ddpm
from ddpm_ext.tables.variances import peer_variances

PREDICTIONS = peer_predictions("diffusers")
# "learned_log" is the name that ddpm_ext writes into configs for its variance "learned". diffusers rejects it.
VARIANCES = {name: variance for name, variance in peer_variances("diffusers").items() if name != "learned_log"}
LEARNED = ("learned", "learned_range")
NOISY = 1  # the smallest timestep at which a step of DDPM has noise
SUPPORT = (
    Support(
        "DDPMScheduler, DDPMParallelScheduler",
        "step",
        "every prediction_type; variance_type fixed_small, fixed_small_log, fixed_large, learned, learned_range; "
        "clip_sample, thresholding; any timesteps",
        "variance_type fixed_large_log; steps to more noise, where diffusers returns NaN; epsilon without a clip where "
        "alphas_cumprod is 0; sample_max_value below 1; float64; gradients",
    ),
    Support(
        "DDIMScheduler, DDIMParallelScheduler",
        "step",
        "every prediction_type; eta up to 1; use_clipped_model_output; variance_noise; clip_sample, thresholding; "
        "set_alpha_to_one; any timestep",
        "eta above 1; steps to more noise, where diffusers returns NaN; epsilon without a clip where alphas_cumprod "
        "is 0; sample_max_value below 1; variance_noise of a wider dtype than the samples; float64; gradients",
    ),
    Support(
        "DDPMScheduler, DDPMParallelScheduler, DDIMScheduler, DDIMParallelScheduler",
        "add_noise, get_velocity",
        "float32, float16, bfloat16; a timestep a sample, or one for all; gradients",
        "float64; samples that are broadcast",
    ),
)


def _make(
    alphas_cumprod: Tensor,
    prediction_type: str,
    clip: Clip | None,
    threshold: DynamicThreshold | None,
    stride_or_timesteps: Tensor | int,
    end: Tensor | float,
    eta: float,
    keep_eps: bool = False,
    variance_type: str | None = None,
) -> FusedRows:
    """The rows of all steps. Raises Fallback for settings without a fused form.

    Args:
        stride_or_timesteps: a stride, for steps from each timestep t to t - stride. Or the timesteps of a loop, for
            steps from each of these to the next one.
        end: alphas_cumprod at the negative timesteps, to which the last steps lead.
        eta, keep_eps: options of DDIM's steps. For DDPM's steps eta must be 1.
        variance_type: diffusers' name of the variance of DDPM's steps, or None for DDIM's steps.
    """
    if variance_type == "fixed_large_log":  # diffusers takes the root of a negative logarithm
        raise Fallback("variance_type is 'fixed_large_log'")
    if prediction_type not in PREDICTIONS or variance_type not in (None, *VARIANCES):
        raise Fallback
    if not 0 <= eta <= 1:
        raise Fallback(f"eta is {eta}")
    levels = alphas_cumprod.detach().cpu()
    if isinstance(stride_or_timesteps, Tensor):
        t = stride_or_timesteps.detach().cpu()
        if len(t.unique()) < len(t):
            raise Fallback("its timesteps repeat")
        next_t = torch.cat([t[1:], t.new_tensor([-1])])
        in_range = (t >= 0) & (t < len(levels)) & (next_t < len(levels))
        t, next_t = t[in_range], next_t[in_range]
    else:
        t = torch.arange(len(levels), device="cpu")
        next_t = t - stride_or_timesteps
    end_level = torch.as_tensor(end, device="cpu").detach().to(levels.dtype)
    now, after = levels[t], torch.where(next_t >= 0, levels[next_t.clamp(min=0)], end_level)
    # If alphas_cumprod is 1, the sample has no noise, so eps does not follow from the sample and x0.
    is_fused = (now < 1) & ((after > 0) | (eta == 0))
    is_fused &= ~(now.signbit() | after.signbit())  # betas above 1 make negative levels, where diffusers returns NaN
    is_fused &= now <= after  # steps to more noise have a negative variance and return NaN, whatever eta is
    if prediction_type == "epsilon" and clip is None:
        is_fused &= now > 0
    steps = None
    if is_fused.any():
        prediction, now, after = PREDICTIONS[prediction_type], now[is_fused], after[is_fused]
        # The quotient is computed in float32, as in diffusers. A beta from a float64 quotient differs by up to 1e-4.
        grid = Jumps(t[is_fused], now.double(), after.double(), (now / after).double())
        if variance_type is None:
            steps = ddim(grid, prediction=prediction, eta=eta, keep_eps=keep_eps)
        else:
            steps = ddpm(grid, prediction=prediction, variance=VARIANCES[variance_type])
    return make_rows(steps, clip, threshold, t[~is_fused].tolist())


class Alphas(Forward):
    """The base of the mixins DDPM and DDIM, whose rows are made from the scheduler's alphas_cumprod."""

    replaces: ClassVar[tuple[str, ...]] = ("step", "add_noise", "get_velocity")
    alphas_cumprod: Tensor
    num_inference_steps: int | None

    def _located(self, timestep: Any, sample: Any, model_output: Any, *options: Any) -> tuple[FusedRows, int, int]:
        """The rows, the timestep on the host, and the index of its row.

        Args:
            options: the arguments of `_make` from `stride_or_timesteps` on.
        """
        if not are_tensors(sample, model_output):
            raise Fallback
        foreign = foreign_method(self._peer, vars(self))
        if foreign is not None:
            raise Fallback(f"its {foreign} is not diffusers' own code; {TRACE_HINT}")
        config = self.config
        rows = self._rows(_make, self.alphas_cumprod, config.prediction_type, *clip_of(config), *options)
        return rows, *self._row(rows, timestep)

    def _take_located(
        self,
        located: tuple[FusedRows, int, int],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any,
        return_dict: bool,
        noisy: bool,
        z: Tensor | None = None,
        **extras: Any,
    ) -> Any:
        """The step's result.

        Args:
            located: the return value of `_located`.
            noisy: whether the step has noise.
            z: the noise of the step, or None to draw it.
        """
        rows, t, row = located
        self._check_step(sample, model_output, z, timestep=timestep)
        if sample.dtype is not model_output.dtype:
            sample = sample.to(result_dtype(model_output, sample))
        if z is None:
            noise = self._noise(noisy, model_output, generator, sample, -t)
        else:
            if not z.is_floating_point() or torch.promote_types(z.dtype, sample.dtype) != sample.dtype:
                raise Fallback(f"variance_noise is {dtype_name(z.dtype)}")
            noise = {"noise": z.to(sample.dtype)}
        result, cls = self._take(rows, row, sample, model_output, noise, **extras), self._known
        return imported(cls.__module__, f"{cls.__name__}Output")(*result) if return_dict else result


class DDPM(Alphas):
    """The mixin for DDPMScheduler and DDPMParallelScheduler."""

    variance_type: str
    custom_timesteps: bool

    def _step(
        self, model_output: Tensor, timestep: int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        variance_type = self.variance_type
        if variance_type != self.config.variance_type:
            raise Fallback("variance_type is not its config's")
        stride_or_timesteps = self.timesteps if self.custom_timesteps or self.num_inference_steps else 1
        located = self._located(timestep, sample, model_output, stride_or_timesteps, 1.0, 1.0, False, variance_type)
        extras: dict[str, Any] = {}
        if variance_type in LEARNED:
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                raise Fallback
            extras = {"model_variance": model_output[:, channels:], "log_variance": variance_type == "learned_range"}
            model_output = model_output[:, :channels]
        noisy = located[1] >= NOISY
        return self._take_located(located, model_output, timestep, sample, generator, return_dict, noisy, **extras)


class DDIM(Alphas):
    """The mixin for DDIMScheduler and DDIMParallelScheduler."""

    final_alpha_cumprod: Tensor

    def _step(
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
        noisy = eta > 0
        if noisy and variance_noise is not None and generator is not None:
            raise Fallback
        if self.num_inference_steps is None:
            raise Fallback
        stride = int(self.config.num_train_timesteps // self.num_inference_steps)
        options = stride, self.final_alpha_cumprod, float(eta), not use_clipped_model_output
        located = self._located(timestep, sample, model_output, *options)
        z = variance_noise if noisy else None
        return self._take_located(located, model_output, timestep, sample, generator, return_dict, noisy, z)
