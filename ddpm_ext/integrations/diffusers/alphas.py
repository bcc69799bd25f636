"""diffusers' DDPMScheduler, DDIMScheduler, and their parallel twins.

They have mixins of their own because their steps need no loop: any timestep may come after any other, and a setting
may change in between. All timesteps' rows are there at once, where tracing would follow a loop anew from each step that
is out of turn, and leave a whole loop to diffusers where one step has no row. And no row of numbers has the variances
that a model of DDPM's learns.
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
from ddpm_ext.integrations.proof import HOW
from ddpm_ext.integrations.shared import Support
from ddpm_ext.integrations.tensors import dtype_name
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.grid import Jumps
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.samplers import ddim, ddpm
from ddpm_ext.tables.variances import peer_variances

PREDICTIONS = peer_predictions("diffusers")
# "learned_log" is what ddpm_ext writes for its "learned", and no type of diffusers, which rejects it.
VARIANCES = {name: own for name, own in peer_variances("diffusers").items() if name != "learned_log"}
LEARNED = ("learned", "learned_range")
NOISY = 1  # the least timestep from which a step of DDPM draws noise
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
    to: Tensor | int,
    end: Tensor | float,
    eta: float,
    keep_eps: bool = False,
    variance_type: str | None = None,
) -> FusedRows:
    """The rows of all steps.

    Args:
        to: a stride, for steps from each timestep t to t - stride. Or the timesteps of a loop, each of whose steps
            leads to the next one.
        end: alphas_cumprod before timestep 0.
        eta, keep_eps: DDIM's.
        variance_type: of DDPM's steps, which have noise as with an eta of 1; None: DDIM's steps.
    """
    if variance_type == "fixed_large_log":  # diffusers takes the square root of a logarithm
        raise Fallback("variance_type is 'fixed_large_log'")
    if prediction_type not in PREDICTIONS or variance_type not in (None, *VARIANCES):
        raise Fallback
    if not 0 <= eta <= 1:
        raise Fallback(f"eta is {eta}")
    levels = alphas_cumprod.detach().cpu()
    if isinstance(to, Tensor):
        t = to.detach().cpu()
        if len(t.unique()) < len(t):
            raise Fallback("its timesteps repeat")
        other = torch.cat([t[1:], t.new_tensor([-1])])
        in_range = (t >= 0) & (t < len(levels)) & (other < len(levels))
        t, other = t[in_range], other[in_range]
    else:
        t = torch.arange(len(levels), device="cpu")
        other = t - to
    below = torch.as_tensor(end, device="cpu").detach().to(levels.dtype)
    now, after = levels[t], torch.where(other >= 0, levels[other.clamp(min=0)], below)
    fused = (now < 1) & ((after > 0) | (eta == 0))  # else eps does not follow from a sample and its x0
    if prediction_type != "sample" and keep_eps and not eta:
        fused |= after < 1
    fused &= ~(now.signbit() | after.signbit())  # betas above 1 make negative levels, where diffusers returns NaN
    fused &= now <= after  # else the variance is negative and its root NaN, whatever eta is
    if prediction_type == "epsilon" and clip is None:
        fused &= now > 0
    steps = None
    if fused.any():
        prediction, now, after = PREDICTIONS[prediction_type], now[fused], after[fused]
        # Their quotient is taken in float32, as diffusers takes it: its beta differs by up to 1e-4 from float64's.
        grid = Jumps(t[fused], now.double(), after.double(), (now / after).double())
        if variance_type is None:
            steps = ddim(grid, prediction=prediction, eta=eta, keep_eps=keep_eps)
        else:
            steps = ddpm(grid, prediction=prediction, variance=VARIANCES[variance_type])
    return make_rows(steps, clip, threshold, t[~fused].tolist())


class Alphas(Forward):
    """Mixin placed before a scheduler's class in the bases."""

    replaces: ClassVar[tuple[str, ...]] = ("step", "add_noise", "get_velocity")
    alphas_cumprod: Tensor
    num_inference_steps: int | None

    def _located(self, timestep: Any, sample: Any, model_output: Any, *of: Any) -> tuple[FusedRows, int, int]:
        """The rows, the timestep on the host, and its row. of: _make's arguments from `to` on."""
        if not are_tensors(sample, model_output):
            raise Fallback
        foreign = foreign_method(self._peer, vars(self))
        if foreign is not None:
            raise Fallback(f"its {foreign} is not diffusers' own code; {HOW}")
        config = self.config
        rows = self._rows(_make, self.alphas_cumprod, config.prediction_type, *clip_of(config), *of)
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
        own: Tensor | None = None,
        **extras: Any,
    ) -> Any:
        """The step's result. own: its noise, in place of what is drawn."""
        rows, t, row = located
        self._check_step(sample, model_output, own, timestep=timestep)
        if sample.dtype is not model_output.dtype:
            sample = sample.to(result_dtype(model_output, sample))
        if own is None:
            noise = self._noise(noisy, model_output, generator, sample, -t)
        else:
            if not own.is_floating_point() or torch.promote_types(own.dtype, sample.dtype) != sample.dtype:
                raise Fallback(f"variance_noise is {dtype_name(own.dtype)}")
            noise = {"noise": own.to(sample.dtype)}
        result, known = self._take(rows, row, sample, model_output, noise, **extras), self._known
        return imported(known.__module__, f"{known.__name__}Output")(*result) if return_dict else result


class DDPM(Alphas):
    """For DDPMScheduler."""

    variance_type: str
    custom_timesteps: bool

    def _step(
        self, model_output: Tensor, timestep: int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        kind = self.variance_type
        if kind != self.config.variance_type:
            raise Fallback("variance_type is not its config's")
        to = self.timesteps if self.custom_timesteps or self.num_inference_steps else 1
        located = self._located(timestep, sample, model_output, to, 1.0, 1.0, False, kind)
        extras: dict[str, Any] = {}
        if kind in LEARNED:
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                raise Fallback
            extras = {"model_variance": model_output[:, channels:], "log_variance": kind == "learned_range"}
            model_output = model_output[:, :channels]
        noisy = located[1] >= NOISY
        return self._take_located(located, model_output, timestep, sample, generator, return_dict, noisy, **extras)


class DDIM(Alphas):
    """For DDIMScheduler."""

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
        of = stride, self.final_alpha_cumprod, float(eta), not use_clipped_model_output
        located = self._located(timestep, sample, model_output, *of)
        own = variance_noise if noisy else None
        return self._take_located(located, model_output, timestep, sample, generator, return_dict, noisy, own)
