"""GaussianDiffusion: the tutorial's class, with each of its steps in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.loop import plan as sampling
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.rows import LEARNED
from ddpm_ext.losses import likelihood
from ddpm_ext.losses.likelihood import BitsPerDim, VlbTerms
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold, as_fixed_clip
from ddpm_ext.process.model_output import split_variance
from ddpm_ext.process.process import ForwardProcess, like_samples
from ddpm_ext.tables.step_table import StepTable

__all__ = ["GaussianDiffusion"]


class GaussianDiffusion(ForwardProcess):
    """A Gaussian diffusion over `timesteps` steps: forward process, reverse process and loss (Ho et al. 2020).

    Args:
        timesteps: steps of the forward process, at least 1.
        beta_schedule: "linear", "cosine", "sigmoid", "scaled_linear", or betas of shape (timesteps,) in (0, 1), of
            which the last may be 1.
        prediction: what the model's output is: the noise "eps", the clean sample "x0",
            "v" = sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x0, or "x_prev", the mean of
            q(x_{t-1} | x_t, x_0).
        variance: of a reverse step, "fixed_small" (the posterior's) or "fixed_large" (beta); or the model's own, for
            which its output has twice the channels: "learned" (its logarithm), "learned_range" (where its logarithm
            lies between those two, -1 to 1; Nichol & Dhariwal 2021, eq. 15) or "learned_variance" (itself, as
            diffusers' "learned").
        backend: "fused" (float32, float16, bfloat16) or "reference" (plain torch, any float dtype).

    Everywhere, samples have shape (batch, ...); `t` is int64 of shape (batch,) on the samples' device, or an int for
    all samples (a tensor on a GPU is not read back: values out of range count as the nearest); `model(x_t, t)` gives a
    tensor of x_t's shape (or an object that holds it as `.sample`) and must not write to its arguments, which are views
    and buffers that later steps use again.

    Its attributes betas, alphas, alphas_cumprod, alphas_cumprod_prev, sqrt_alphas_cumprod,
    sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod,
    posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1 and posterior_mean_coef2 are float64
    (timesteps,), on the CPU.

    Raises:
        TypeError, ValueError: an argument of another type, an unknown name, or out of range.
    """

    # ---------------------------------------------------------------------------------------- reverse process

    def p_mean_variance(
        self, model: Model, x_t: Tensor, t: int | Tensor, clip_denoised: bool | Clip = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), by the model's prediction.

        Args:
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1], or a range (low, high) to clip it to.

        Returns:
            mean as x_t, differentiable in x_t and through the model; variance and log-variance of shape
            (batch, 1, ...), or of x_t's where they are learned.
        """
        table = self._table("steps", "x_t", x_t)
        self._ops.check_reverse_step(x_t, table, t)
        clip = as_fixed_clip(clip_denoised)
        model_output = self._call(model, x_t, t)
        learned = None
        if self.variance in LEARNED:
            model_output, learned = split_variance(x_t, model_output)
        mean = self._ops.reverse_step(x_t, model_output, table, t, clip=clip, add_noise=False)
        if learned is None:
            return mean, self._extract("p_variance", t, x_t), self._extract("p_log_variance", t, x_t)
        learned = learned.to(checks.compute_dtype(x_t.dtype))
        if self.variance == "learned_variance":
            return mean, learned, learned.log()
        constant, slope = (like_samples(column, t, x_t) for column in self._learned(x_t).unbind(1))
        log_variance = constant + slope * learned
        return mean, log_variance.exp(), log_variance

    def _learned(self, x: Tensor) -> Tensor:
        """(timesteps, 2): of a log-variance, what is added to the model's and what that is multiplied by."""
        dtype = checks.compute_dtype(x.dtype)
        return self._tables.get("learned_log_variance", x.device, dtype)

    @torch.no_grad()
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
        """x_{t-1} ~ p(x_{t-1} | x_t): one step of algorithm 2, in one launch after the model's call.

        Args:
            model: model(x_t, t) -> (batch, ...).
            x_t: (batch, ...).
            t: int64 (batch,) or int, in [0, timesteps).
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1], or a range (low, high) to clip it to.
            noise: as x_t; None: drawn by `rng` (stream 0, draw t), or by a seed from torch's default generator.
            out: as x_t: where the result goes; x_t itself is fine.

        Returns:
            x_{t-1}, as x_t, without gradients; at t = 0 no noise is added.

        Raises:
            TypeError, ValueError: an argument of another type, shape, dtype or device, or out of range.
        """
        table = self._table("steps", "x_t", x_t)
        self._ops.check_reverse_step(x_t, table, t, noise=noise, rng=rng, out=out)
        options: dict[str, Any] = {"clip": as_fixed_clip(clip_denoised), "noise": noise, "rng": rng, "out": out}
        model_output = self._call(model, x_t, t)
        if self.variance not in LEARNED:
            return self._ops.reverse_step(x_t, model_output, table, t, **options)
        model_output, variance = split_variance(x_t, model_output)
        options |= {"model_variance": variance, "log_variance": self.variance != "learned_variance"}
        return self._ops.extended_step(x_t, model_output, self._table("extended", "x_t", x_t), t, **options)

    def p_sample_loop(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        sampler: str | StepTable = "ddpm",
        steps: int | None = None,
        spacing: str = "linspace",
        timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        clip_denoised: bool | Clip | DynamicThreshold = True,
        guidance: Guidance | float | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        inpaint: Inpaint | None = None,
        self_condition: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        start: Tensor | Interpolation | None = None,
        strength: float = 1.0,
        noise: Tensor | None = None,
        rng: Philox | None = None,
        record: str | int | Sequence[int] = "all",
        x0: bool = False,
        callback: Callable[[sampling.Record], object] | None = None,
        progress: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool | str = False,
        autocast: torch.dtype | None = None,
        graph: bool | str = False,
    ) -> list[np.ndarray] | Tensor:
        """From pure noise to samples: algorithm 2, or that of another sampler.

        Args:
            model: model(x_t, t, **model_kwargs) -> (batch, ...), twice the channels where the variance is learned. It
                sees two buffers in turn: what it wants to keep, it must copy.
            shape: (batch, ...).
            sampler: "ddpm", "ddim", "dpmpp_2m" or another of ddpm_ext.samplers.SAMPLERS; or a StepTable, whose rows it
                takes as they are.
            steps: how many of the timesteps; None: all.
            spacing: which of them, "linspace" (evenly, with both ends), "leading", "trailing", "quadratic", "ddim25" or
                "10,15,20" and the like (see ddpm_ext.spacing); "karras" and "log_snr" go between them, and the model
                gets float32 timesteps.
            timesteps: these instead, int64, descending.
            eta: the noise of a sampler that has it, 0 (none) to 1 (as much as ddpm) and beyond; None: 0 for ddim, 1 for
                the others.
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1] in each step; or a range (low, high) to clip
                it to; or a DynamicThreshold.
            guidance: a Guidance, classifier-free, or its scale.
            cond_fn: cond_fn(x_t, t, **model_kwargs) -> (batch, ...), the gradient of a classifier's log-probability
                (Dhariwal & Nichol 2021): it moves ddpm's mean (algorithm 1), and every other sampler's eps (2).
            denoised_fn: denoised_fn(x_0) -> x_0, on each prediction before it is clipped.
            inpaint: an Inpaint, of samples that are known in part.
            self_condition: whether the model gets the x_0 of the step before, zeros at first, as its third argument
                (Chen et al. 2023, "Analog Bits").
            model_kwargs: what else model and cond_fn get.
            start: `shape`, samples to begin from instead of pure noise: they get the noise of the first step taken
                (stream 1, as pure noise does), and `strength` of the steps, the last, take it away (Meng et al. 2022,
                "SDEdit"); or an Interpolation between two.
            strength: 0 (exclusive, at least one step) to 1, how many of the steps; without a start all.
            noise: `shape`, what the first step begins from, instead of drawn noise.
            rng: seed and sample ids; None: a seed from torch's default CPU generator. One with a draw or a stream of
                its own is refused: it would give each step the same noise.
            record: "all": each step's samples; an int k: every k-th step's and the last; a list of ints: those steps',
                0 the first; "x0": each step's predicted clean samples; "last": the last samples alone.
            x0: whether a Record holds the predicted clean samples, too.
            callback: called with a Record (step, timestep, x_t, x0) after each step; the loop ends there if it returns
                true.
            progress: whether to show a progress bar (where tqdm is installed).
            device: where to sample; None: where start or noise are, or the model's parameters, else the CPU.
            dtype: of the samples.
            compile: whether to give the model to torch.compile; or with which of its modes.
            autocast: float16 or bfloat16, to which torch.autocast may lower the model's arithmetic, and that alone.
            graph: True or "step": the step, model and all, is captured in a CUDA graph and played again; "loop": all
                steps in one. Where that is impossible, a warning says why, and steps are called as without.

        Returns:
            A list of numpy arrays of `shape` (bfloat16 as float32), or with record="last" a tensor.

        Raises:
            TypeError, ValueError: an argument of another type, an unknown name, or out of range.
        """
        plan = sampling.make_plan(
            self,
            model,
            shape,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            timesteps=timesteps,
            eta=eta,
            clip_denoised=clip_denoised,
            guidance=guidance,
            cond_fn=cond_fn,
            denoised_fn=denoised_fn,
            inpaint=inpaint,
            self_condition=self_condition,
            model_kwargs=model_kwargs,
            start=start,
            strength=strength,
            noise=noise,
            rng=rng,
            x0=x0 or record == "x0",
            device=device,
            dtype=dtype,
            compile=compile,
            autocast=autocast,
            graph=graph,
        )
        return sampling.collect(plan, record=record, callback=callback, progress=progress)

    def sample_progressive(
        self, model: Model, shape: tuple[int, ...], *, progress: bool = False, **options: Any
    ) -> Iterator[sampling.Record]:
        """p_sample_loop, step by step: a Record (step, timestep, x_t, x0) after each, taken when it is asked for.

        Both tensors are buffers that the loop goes on writing to: what is to last must be copied. Gradients are not
        recorded.

        Arguments are p_sample_loop's, but for record and callback, and for graph="loop", of which nothing is seen in
        between. They are checked at once; what is raised is p_sample_loop's, too.
        """
        plan = sampling.make_plan(self, model, shape, **options)
        if plan.whole:
            raise ValueError("graph is 'loop', expected True or 'step': nothing is seen in between")
        return plan.make().run(progress)

    def capture(
        self, model: Model, shape: tuple[int, ...], *, graph: bool | str = True, **options: Any
    ) -> sampling.CapturedLoop:
        """A loop to take again and again, by a CUDA graph that is recorded once: captured(rng) gives samples.

        Arguments are p_sample_loop's, but for record, callback, progress and x0. Tensors of model_kwargs are copied,
        and can be replaced from call to call; other conditioning belongs into tensors that the caller writes to. What
        is raised is p_sample_loop's, too.
        """
        plan = sampling.make_plan(self, model, shape, graph=graph or True, **options)
        return sampling.CapturedLoop(plan.make(), plan.whole)

    def sample(
        self, model: Model, image_size: int, batch_size: int = 8, channels: int = 3, **options: Any
    ) -> list[np.ndarray] | Tensor:
        """Images of shape (batch_size, channels, image_size, image_size): p_sample_loop, and its options."""
        return self.p_sample_loop(model, (batch_size, channels, image_size, image_size), **options)

    # --------------------------------------------------------------------------------------------- likelihood

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
        """The variational bound's terms at t, in bits per dimension: see ddpm_ext.likelihood.vlb_terms."""
        return likelihood.vlb_terms(self, model, x_start, t, noise=noise, rng=rng, clip_denoised=clip_denoised)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """The prior's term of the bound, (batch,), in bits per dimension: see ddpm_ext.likelihood.prior_bpd."""
        return likelihood.prior_bpd(self, x_start)

    def bits_per_dim(
        self,
        model: Model,
        x_start: Tensor,
        *,
        rng: Philox | None = None,
        clip_denoised: bool | Clip = True,
        progress: bool = False,
    ) -> BitsPerDim:
        """The bound of 8-bit images' negative log-likelihood, in bits per dimension, by one call of the model a
        timestep: see ddpm_ext.likelihood.bits_per_dim."""
        return likelihood.bits_per_dim(self, model, x_start, rng=rng, clip_denoised=clip_denoised, progress=progress)
