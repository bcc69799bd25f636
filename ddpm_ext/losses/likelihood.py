"""The variational bound of a sample's negative log-likelihood, in bits per dimension: Ho et al. 2020, eq. (5).

The bound has one term for each timestep: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and the negative
log-likelihood of the image's 8-bit values (eq. 13) for t = 0. The prior's term, KL(q(x_T | x_0) || p(x_T)), does not
depend on the model. A term of a sample is the mean over its elements, divided by ln 2. It is float32 (float64 for
float64 samples).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import counter
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.ops.gaussians import discretized_gaussian_log_likelihood, normal_kl
from ddpm_ext.ops.noise import Philox, rng_of_many
from ddpm_ext.process.clip import as_fixed_clip
from ddpm_ext.process.model_output import split_variance
from ddpm_ext.process.reverse import ReverseMethods
from ddpm_ext.tables.levels import pure_noise

__all__ = ["BitsPerDim", "VlbTerms"]


class VlbTerms(NamedTuple):
    """For each sample, the bound's term at the sample's timestep.

    Attributes:
        output: (batch,), in bits per dimension.
        pred_xstart: (batch, ...), the predicted x_0, without gradients.

    Examples:
        >>> terms = GaussianDiffusion(20).vlb_terms(model, images, 5, rng=Philox(seed=0))
        >>> terms.output.shape
        torch.Size([4])
    """

    output: Tensor
    pred_xstart: Tensor


class BitsPerDim(NamedTuple):
    """The bound and its terms, in bits per dimension. Column t is timestep t.

    Attributes:
        total: (batch,), the bound, which is the prior's term plus the sum of vlb's row.
        prior: (batch,), the prior's term.
        vlb: (batch, timesteps), the terms.
        x_start_mse: (batch, timesteps), the mean squared error of the predicted x_0.
        mse: (batch, timesteps), the mean squared error of the noise that follows from the predicted x_0.

    Examples:
        >>> bound = GaussianDiffusion(20).bits_per_dim(model, images, rng=Philox(seed=0))
        >>> bound.total.shape, bound.vlb.shape
        (torch.Size([4]), torch.Size([4, 20]))
    """

    total: Tensor
    prior: Tensor
    vlb: Tensor
    x_start_mse: Tensor
    mse: Tensor


def _mean_bits(nats: Tensor) -> Tensor:
    """The mean over each sample's elements, converted from nats to bits, (batch,)."""
    return _mean_flat(nats) / math.log(2)


def _mean_flat(values: Tensor) -> Tensor:
    """The mean over each sample's elements, (batch,)."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


class LikelihoodMethods(ReverseMethods):
    """The bound and its terms: methods of GaussianDiffusion."""

    def vlb_terms(
        self,
        model: Model,
        x_start: Tensor,
        t: int | Tensor,
        *,
        noise: Tensor | None = None,
        rng: Philox | None = None,
        clip_denoised: bool | Clip = True,
    ) -> VlbTerms:
        """The bound's term at t, estimated by one call of the model at x_t ~ q(x_t | x_0).

        With a variance that is not learned, t = 0 has `posterior_variance[1]`, the posterior's variance of t = 1 for
        variance-preserving samples, so that the log-likelihood is finite. (With a single timestep it has beta.)

        Args:
            model: see GaussianDiffusion.
            x_start: (batch, ...), 8-bit images in [-1, 1], of any float dtype. The bound is computed in float32, also
                for 16-bit images (in float64 for float64 images).
            t: int64 (batch,) or int, in [0, timesteps).
            noise: like x_start. With None, it is drawn by `rng` (stream 2, draw t), or by a seed from torch's default
                generator.
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1], or a range (low, high) to clip it to.

        Returns:
            VlbTerms; its output is differentiable through the model.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.
        """
        clip = as_fixed_clip(clip_denoised)
        x_t = self.q_sample(x_start, t, noise, rng=rng)
        model_output = self.call_model(model, x_t, t)
        dtype = checks.compute_dtype(x_start.dtype)
        x_start, x_t = x_start.to(dtype), x_t.to(dtype)

        mean, _, log_variance = self.p_mean_variance(lambda *_: model_output, x_t, t, clip_denoised)
        if not self.variance_entry.learned:
            log_variance = self.extract("finite_log_variance", t, x_t)

        def divergence() -> Tensor:
            true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
            return _mean_bits(normal_kl(true_mean, true_log_variance, mean, log_variance))

        def decoder() -> Tensor:
            return -_mean_bits(discretized_gaussian_log_likelihood(x_start, mean=mean, log_scale=log_variance / 2))

        if isinstance(t, Tensor):
            output = torch.where(t == 0, decoder(), divergence())
        elif t == 0:
            output = decoder()
        else:
            output = divergence()

        predicted = split_variance(x_t, model_output)[0] if self.variance_entry.learned else model_output
        pred_xstart = self.ops.step_with_options(
            x_t.detach(), predicted.detach(), self.table("x0", "x_t", x_t), t, clip=clip, add_noise=False
        )
        return VlbTerms(output, pred_xstart)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """The prior's term, (batch,), in bits per dimension: KL(q(x_T | x_0) || p(x_T)), with p(x_T) the distribution
        of the noise that sampling loops start from.

        Args:
            x_start: (batch, ...), of any float dtype.

        Raises:
            TypeError, ValueError: x_start has a wrong type or dtype.
        """
        checks.samples("x_start", x_start)
        x_start = x_start.to(checks.compute_dtype(x_start.dtype))
        mean, _, log_variance = self.q_mean_variance(x_start, self.timesteps - 1)
        prior = pure_noise(self.schedule.signal[-1].item(), self.schedule.noise[-1].item())
        return _mean_bits(normal_kl(mean, log_variance, 0.0, 2 * math.log(prior)))

    @torch.no_grad()
    def bits_per_dim(
        self,
        model: Model,
        x_start: Tensor,
        *,
        rng: Philox | None = None,
        clip_denoised: bool | Clip = True,
        progress: bool = False,
    ) -> BitsPerDim:
        """The bound of each sample's negative log-likelihood, in bits per dimension, without gradients.

        The model is called once for each timestep. A sample's bound depends on the seed and its id, not on its batch.

        Args:
            model, x_start, clip_denoised: see vlb_terms.
            rng: the seed and sample ids (stream 2, draw t). With None, torch's default generator draws a seed. An rng
                with its own draw, which would give each timestep the same noise, or its own stream is rejected.
            progress: whether to show a progress bar on a terminal (if tqdm is installed).

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.

        Examples:
            >>> bits = GaussianDiffusion(20).bits_per_dim(model, images, rng=Philox(seed=0)).total  # (batch,)
        """
        prior = self.prior_bpd(x_start)
        rng = rng_of_many(rng, x_start.device)
        levels = self.alphas_cumprod
        vlb, x_start_mse, mse = [], [], []
        count = self.timesteps
        for t in counter(count, "bits per dimension, timestep") if progress else range(count):
            output, pred_xstart = self.vlb_terms(model, x_start, t, rng=rng, clip_denoised=clip_denoised)
            error = pred_xstart - x_start
            vlb.append(output)
            x_start_mse.append(_mean_flat(error**2))
            # The predicted x_0 and noise add up to the same x_t, so the noise's error is x_0's times signal / noise.
            mse.append(_mean_flat((error * math.sqrt(levels[t] / (1 - levels[t]))) ** 2))
        terms = torch.stack(vlb, 1)
        total = prior + terms.sum(1, dtype=torch.float64).to(prior.dtype)
        return BitsPerDim(total, prior, terms, torch.stack(x_start_mse, 1), torch.stack(mse, 1))
