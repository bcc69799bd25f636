"""One step of the reverse process: the distribution p(x_{t-1} | x_t), and a draw from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.ops.noise import Philox, is_differentiated
from ddpm_ext.ops.torch_library import is_traced
from ddpm_ext.process.clip import as_fixed_clip
from ddpm_ext.process.model_output import split_variance
from ddpm_ext.process.process import Process

_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled

# The range of a learned log-variance, and of a variance that the model returns. ops.step_with_options has the same
# ranges, with [-87, 88] for the logarithm of the standard deviation.
LOG_VARIANCE_RANGE, VARIANCE_RANGE = (-174.0, 176.0), (2.0**-100, 2.0**100)


class ReverseMethods(Process):
    """A step of the reverse process: methods of GaussianDiffusion."""

    def p_mean_variance(
        self, model: Model, x_t: Tensor, t: int | Tensor, clip_denoised: bool | Clip = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), from the model's output.

        Args:
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1], or a range (low, high) to clip it to.

        Returns:
            mean like x_t, differentiable in x_t and through the model; variance and log-variance of shape
            (batch, 1, ...), or of x_t's shape if they are learned. As in p_sample, a learned log-variance is clamped to
            [-174, 176], and a variance that the model returns to [2^-100, 2^100]. The variance is at most the largest
            number of its dtype.
        """
        table, clip = self.table("steps", "x_t", x_t), as_fixed_clip(clip_denoised)
        self.reverse_step(x_t, clip, None, None).check(x_t, *checks.split_t(t))
        model_output = self.call_model(model, x_t, t)
        variance = self.variance_entry
        variance_output = None
        if variance.learned:
            model_output, variance_output = split_variance(x_t, model_output)
        mean = self.ops.reverse_step(x_t, model_output, table, t, clip=clip, add_noise=False)
        if variance_output is None:
            return mean, self.extract("p_variance", t, x_t), self.extract("p_log_variance", t, x_t)
        variance_output = variance_output.to(checks.compute_dtype(x_t.dtype))
        if not variance.logarithm:
            variance_output = variance_output.clamp(*VARIANCE_RANGE)
            if self.schedule.scale is not None:  # the model returns the variance of a variance-preserving sample
                variance_output = variance_output * self.extract("variance_before", t, x_t)
            return mean, variance_output, variance_output.log()
        columns = self.tables.get("learned_log_variance", x_t.device, checks.compute_dtype(x_t.dtype)).unbind(1)
        constant, slope = (self.at(column, t, x_t) for column in columns)
        log_variance = (constant + slope * variance_output).clamp(*LOG_VARIANCE_RANGE)
        return mean, log_variance.exp().clamp(max=torch.finfo(log_variance.dtype).max), log_variance

    def p_sample(
        self,
        model: Model,
        x_t: Tensor,
        t: int | Tensor,
        clip_denoised: bool | Clip = True,
        *,
        noise: Tensor | None = None,
        rng: Philox | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t): one step of algorithm 2 of Ho et al. 2020, in one launch after the model's call.

        Args:
            model: model(x_t, t) -> (batch, ...).
            x_t: (batch, ...).
            t: int64 (batch,) or int, in [0, timesteps).
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1], or a range (low, high) to clip it to.
            noise: like x_t. With None, it is drawn by `rng` (stream 0, draw t), or by a seed from torch's default
                generator.
            out: a tensor like x_t for the result, or x_t itself.

        Returns:
            x_{t-1}, like x_t. Gradients are not recorded, except that torch.func can take derivatives with
            backend="reference". At t = 0 no noise is added.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.
            NotImplementedError: torch.func takes a derivative through a fused step.

        Examples:
            >>> gd, x = GaussianDiffusion(1000), x_t
            >>> for t in reversed(range(1000)):
            ...     x = gd.p_sample(model, x, t, rng=Philox(seed=0))
        """
        clip = (-1.0, 1.0) if clip_denoised is True else as_fixed_clip(clip_denoised)
        step = self.reverse_step(x_t, clip, noise, rng)
        differentiated = not is_traced() and is_differentiated()
        if differentiated and self.backend == "fused":
            raise NotImplementedError("p_sample: torch.func takes a derivative, expected none, or backend='reference'")
        recording = _is_grad_enabled()
        try:
            # torch.no_grad() is Python code: an interrupt within it could leave gradients off for the caller.
            _set_grad_enabled(differentiated and recording)
            row, index = checks.split_t(t)
            step.check(x_t, row, index, out)
            model_output = self.call_model(model, x_t, t)
            _set_grad_enabled(differentiated and recording)  # the model may have enabled gradients
            if not self.variance_entry.learned:
                return step.take(x_t, model_output, row, index, out)
            model_output, variance_output = split_variance(x_t, model_output)
            options = {"model_variance": variance_output, "log_variance": self.variance_entry.logarithm}
            return step.take(x_t, model_output, row, index, out, **options)
        finally:
            _set_grad_enabled(recording)
