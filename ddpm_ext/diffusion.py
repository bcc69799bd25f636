"""GaussianDiffusion: the class for training and sampling, which takes each step in one kernel launch.

Its methods have the names and arguments of the class of Zhihu's tutorial on DDPM (zhuanlan.zhihu.com/p/563661713).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from torch import Tensor

from ddpm_ext.base.types import Clip, Model
from ddpm_ext.loop.begin import check_model
from ddpm_ext.loop.loop import Loop
from ddpm_ext.loop.options import (
    CaptureKeywords,
    LoopOptions,
    ProgressiveKeywords,
    Record,
    Recorded,
    SampleKeywords,
    lists_options_of,
)
from ddpm_ext.loop.results import CapturedLoop, collect
from ddpm_ext.loop.rows import CACHED, LoopRows, LoopRowsCache, checked_loop_rows
from ddpm_ext.losses.likelihood import LikelihoodMethods
from ddpm_ext.losses.rows import LossRows
from ddpm_ext.losses.step_log_prob import StepLogProb
from ddpm_ext.losses.train_losses import LossMethods
from ddpm_ext.tables.schedules import NoiseSchedule
from ddpm_ext.tables.step_table import StepTable

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch also needs typing_extensions


class GaussianDiffusion(LossMethods, LikelihoodMethods):
    """A Gaussian diffusion over `timesteps` steps: forward process, reverse process and loss (Ho et al. 2020).

    Args:
        timesteps: the number of steps of the forward process, at least 1.
        beta_schedule: "linear", "cosine", "sigmoid", "scaled_linear", or betas of shape (timesteps,) in (0, 1), of
            which the last may be 1. "flow" is rectified flow, x_t = (1 - sigma) x_0 + sigma eps with sigma = (t + 1) /
            timesteps. A ddpm_ext.tables.schedules.NoiseSchedule has any pairs of signal and noise.
        prediction: the model's output. "eps" is the noise, "x0" the clean sample, "v" is sqrt(alphas_cumprod) eps -
            sqrt(1 - alphas_cumprod) x0, and "flow" is eps - x0. "edm" is the output of EDM's network. "x_prev" is the
            mean of q(x_{t-1} | x_t, x_0), only for schedules of betas.
        variance: the variance of a reverse step, "fixed_small" (the posterior's) or "fixed_large" (beta). Or the model
            returns it in further channels, as many as the samples have. With "learned" they are its logarithm. With
            "learned_range" they are numbers from -1 to 1, the position of its logarithm between those of "fixed_small"
            and "fixed_large" (Nichol & Dhariwal 2021, eq. 15). With "learned_variance" they are the variance itself, as
            with diffusers' "learned".
        backend: "fused" (float32, float16, bfloat16) or "reference" (plain torch, any float dtype).

    In all methods, samples have shape (batch, ...). `t` is int64 of shape (batch,) on the samples' device, or an int
    for all samples. Values of a `t` on a GPU are not checked: one out of range counts as the nearest timestep.
    `model(x_t, t)` returns a tensor of x_t's shape, or an object with such a tensor as `.sample`. The model must not
    write to its arguments, which are views and buffers that later steps use.

    All arguments except beta_schedule are attributes. Further attributes, float64 (timesteps,) on the CPU, are the
    schedule's betas, alphas, alphas_cumprod, alphas_cumprod_prev, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
    log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod, posterior_variance,
    posterior_log_variance_clipped, posterior_mean_coef1 and posterior_mean_coef2. For a schedule without betas they
    are those of the variance-preserving x_t / sqrt(signal^2 + noise^2). The methods take x_t itself, and pass the
    schedule's timesteps to the model.

    Raises:
        TypeError, ValueError: an argument has a wrong type, an unknown name, or is out of range.

    Examples:
        >>> gd = GaussianDiffusion(1000, "cosine", prediction="v")
        >>> x_t = gd.q_sample(images, 500, rng=Philox(seed=0))
        >>> x_0 = gd.predict_start_from_noise(x_t, 500, noise=0.1 * x_t)
        >>> for moments in (
        ...     gd.q_mean_variance(images, 500),
        ...     gd.q_posterior_mean_variance(images, x_t, 500),
        ...     gd.p_mean_variance(model, x_t, 500),
        ... ):
        ...     mean, variance, log_variance = moments
        >>> bits = gd.vlb_terms(model, images, 500).output + gd.prior_bpd(images)  # (batch,)
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_schedule: str | Tensor | NoiseSchedule = "linear",
        *,
        prediction: str = "eps",
        variance: str = "fixed_small",
        backend: str = "fused",
    ) -> None:
        super().__init__(timesteps, beta_schedule, prediction=prediction, variance=variance, backend=backend)
        self._loss_rows, self._loop_rows = LossRows(self), LoopRowsCache(CACHED)

    @overload
    def p_sample_loop(
        self, model: Model, shape: tuple[int, ...], *, record: Literal["last"], **options: Unpack[SampleKeywords]
    ) -> Tensor: ...
    @overload
    def p_sample_loop(
        self, model: Model, shape: tuple[int, ...], *, record: Recorded = "all", **options: Unpack[SampleKeywords]
    ) -> list[np.ndarray]: ...
    @overload
    def p_sample_loop(
        self, model: Model, shape: tuple[int, ...], *, record: str, **options: Unpack[SampleKeywords]
    ) -> list[np.ndarray] | Tensor: ...

    @lists_options_of(LoopOptions)
    def p_sample_loop(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        record: str | int | Sequence[int] = "all",
        callback: Callable[[Record], object] | None = None,
        progress: bool = True,
        **options: Unpack[ProgressiveKeywords],
    ) -> list[np.ndarray] | Tensor:
        """Samples from pure noise, by algorithm 2 of Ho et al. 2020 or another sampler.

        Args:
            model: model(x_t, t, **model_kwargs) -> (batch, ...), with twice the channels for a learned variance. Its
                inputs are buffers that later steps overwrite. It must copy tensors that it keeps.
            shape: (batch, ...).
            sampler: "ddpm" (the default), "ddim", "dpmpp_2m" or another of ddpm_ext.tables.samplers.SAMPLERS. Names of
                other libraries are accepted, also with a spacing, such as "DPM++ 2M Karras". Or a StepTable, whose rows
                are the steps.
            steps: the number of timesteps to visit. Default: all.
            spacing: the timesteps to visit. Default: "trailing", evenly down from the last. "linspace" (evenly, with
                both ends), another of ddpm_ext.tables.spacing.TIMESTEP_SPACINGS, "ddim25", "10,15,20" and the like are
                accepted. "karras" and the others of ddpm_ext.tables.sigma_grids.SIGMA_GRIDS have fractional timesteps,
                so that the model gets float32 timesteps.
            timesteps: the timesteps to visit, int64, descending, in place of steps and spacing.
            eta: the amount of noise, for samplers with this argument. 0 gives none, 1 ddpm's; it may be larger.
                Default: the sampler's own, which is 0 for ddim and 1 for most others.
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1] in each step (the default). Or a range (low,
                high) to clip it to, or a DynamicThreshold.
            guidance: a Guidance, for classifier-free guidance, or its scale.
            cond_fn: cond_fn(x_t, t, **model_kwargs) -> (batch, ...), the gradient of a classifier's log-probability
                (Dhariwal & Nichol 2021). It changes the mean of ddpm's steps (algorithm 1), and the eps of other
                samplers' steps (algorithm 2).
            denoised_fn: denoised_fn(x_0) -> x_0, applied to each prediction before it is clipped.
            inpaint: an Inpaint, for samples of which a part is known.
            self_condition: whether the model's third argument is the predicted x_0 of the step before, at first zeros
                (Chen et al. 2023, "Analog Bits").
            model_kwargs: further arguments of model and cond_fn.
            start: samples of `shape` to begin from instead of pure noise. Noise is added to them up to the level of the
                first step that is taken (stream 1, as for pure noise), and the steps from there on remove it (Meng et
                al. 2022, "SDEdit"). Or an Interpolation between two such samples.
            strength: the share of the steps that is taken, above 0 and at most 1: the last ones. At least one step must
                remain. Without a start, strength must be 1.
            noise: start noise of `shape`, in place of drawn noise. Drawn noise is standard normal, or for samples that
                are not variance-preserving, it has the standard deviation of the first level's noise.
            rng: the seed and sample ids. With None, torch's default CPU generator draws a seed. A Philox with its own
                draw, which would give each step the same noise, or its own stream is rejected.
            record: the results to return. "all" returns each step's samples, an int k those of every k-th step and of
                the last. A list of ints returns the samples of these steps, with 0 for the first. "x0" returns each
                step's predicted clean samples, "last" only the last samples.
            x0: whether a Record has the predicted clean samples as well.
            callback: called with a Record (step, timestep, x_t, x0) after each step. If it returns true, the loop ends.
            progress: whether to show a progress bar on a terminal (if tqdm is installed).
            device: the samples' device. Default: that of start, of noise, or of the model's parameters, else the CPU.
            dtype: the samples' dtype, torch.float32 by default.
            compile: whether torch.compile compiles the model, or the mode of torch.compile.
            autocast: float16 or bfloat16, for the model's arithmetic by torch.autocast. It has no effect on the
                arithmetic of the steps, which is float32 (float64 for float64 samples).
            input_dtype: float16 or bfloat16, the dtype of the model's input, for models whose parameters have it. The
                samples of the steps stay float32, as do the inputs of cond_fn and self-conditioning. One launch writes
                the samples in both dtypes.
            graph: with True or "step", each step, with the model, is the replay of a CUDA graph. Steps of the same kind
                share a graph, which is captured once. With "loop", all steps are one graph. If a capture is impossible,
                a warning gives the reason, and the loop runs without a graph.

        Returns:
            A list of numpy arrays of `shape` (float32 for bfloat16), or with record="last" a tensor.

        Raises:
            TypeError, ValueError: an argument has a wrong type, an unknown name, or is out of range.

        Examples:
            >>> gd, options = GaussianDiffusion(1000), {"rng": Philox(seed=0), "progress": False, "record": "last"}
            >>> gd.p_sample_loop(model, (4, 3, 8, 8), sampler="dpmpp_2m", steps=20, **options).shape
            torch.Size([4, 3, 8, 8])
        """
        if isinstance(record, str) and record == "x0":
            options["x0"] = True
        checked, rows = self._checked(model, options)
        return collect(
            lambda: Loop(self.ops, model, shape, rows, checked),
            len(rows),
            whole=checked.whole,
            record=record,
            callback=callback,
            progress=progress,
        )

    @lists_options_of(LoopOptions)
    def sample_progressive(
        self, model: Model, shape: tuple[int, ...], *, progress: bool = False, **options: Unpack[ProgressiveKeywords]
    ) -> Iterator[Record]:
        """p_sample_loop as an iterator: each step is taken when its Record (step, timestep, x_t, x0) is requested.

        The two tensors are buffers that later steps overwrite: copy those that you keep. Gradients are not recorded.

        Args:
            options: p_sample_loop's, except record, callback and graph="loop".

        Raises:
            TypeError, ValueError: see p_sample_loop. Wrong options raise them before the first Record is requested.

        Examples:
            >>> loop = GaussianDiffusion(1000).sample_progressive(model, (4, 3, 8, 8), sampler="ddim", steps=4)
            >>> [(record.step, record.timestep) for record in loop]
            [(0, 999), (1, 749), (2, 499), (3, 249)]
        """
        checked, rows = self._checked(model, options)
        if checked.whole:
            raise ValueError("graph is 'loop', expected True or 'step': nothing is seen in between")
        return Loop(self.ops, model, shape, rows, checked).run(progress)

    @lists_options_of(LoopOptions, "x0")
    def capture(
        self, model: Model, shape: tuple[int, ...], *, graph: bool | str = True, **options: Unpack[CaptureKeywords]
    ) -> CapturedLoop:
        """A loop that can run many times, by CUDA graphs that are captured once: `captured(rng)` returns samples.

        Args:
            options: p_sample_loop's, except record, callback, progress and x0. Tensors in model_kwargs are copied, and
                each call can replace them. Functions such as cond_fn can read tensors that the caller changes between
                calls. The tensors of an Inpaint must not change, because the loop may have copied them.

        Raises:
            TypeError, ValueError: see p_sample_loop. graph=False raises ValueError.

        Examples:
            >>> captured = GaussianDiffusion(1000).capture(model, (4, 3, 8, 8), sampler="ddim", steps=4, device="cuda")
            >>> first, second = captured(Philox(seed=0)), captured(Philox(seed=1))
        """
        if not graph:
            raise ValueError(f"graph is {graph!r}, expected True, 'step' or 'loop'")
        checked, rows = self._checked(model, {**options, "graph": graph})
        return CapturedLoop(Loop(self.ops, model, shape, rows, checked))

    def step_log_prob(
        self,
        *,
        sampler: str | StepTable = "ddpm",
        steps: int | None = None,
        spacing: str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        clip_denoised: bool | Clip = True,
        reduction: str = "mean",
    ) -> StepLogProb:
        """A StepLogProb, which computes the log-probability of the steps of a loop with these options of p_sample_loop.

        Args:
            sampler, steps, spacing, timesteps, eta, clip_denoised: the options of the loop.
            reduction: see StepLogProb.

        Raises:
            TypeError, ValueError: see p_sample_loop and StepLogProb; the steps read a variance that the model returns.

        Examples:
            >>> options = {"sampler": "ddim", "steps": 4, "eta": 1.0}
            >>> log_prob = gd.step_log_prob(**options)
            >>> path = [x_t, *(r.x_t.clone() for r in gd.sample_progressive(model, x_t.shape, noise=x_t, **options))]
            >>> log_prob(model(path[0], 999), path[0], path[1], row=0).shape
            torch.Size([4])
        """
        options = LoopOptions(
            sampler=sampler, steps=steps, spacing=spacing, timesteps=timesteps, eta=eta, clip_denoised=clip_denoised
        )
        rows = checked_loop_rows(self._loop_rows, self, options)
        if rows.variance is not None:
            raise ValueError(
                f"variance is {self.variance!r}, expected 'fixed_small' or 'fixed_large', or a sampler other than "
                "'ddpm': a step with the model's own variance has no such log-probability"
            )
        return StepLogProb(rows.table, clip_denoised=clip_denoised, reduction=reduction, backend=self.backend)

    def _checked(self, model: Model, options: ProgressiveKeywords) -> tuple[LoopOptions, LoopRows]:
        """The checked options of a loop, and the rows that they select."""
        check_model(model)
        checked = LoopOptions.of(options)
        return checked, checked_loop_rows(self._loop_rows, self, checked)

    @overload
    def sample(
        self,
        model: Model,
        image_size: int,
        batch_size: int = 8,
        channels: int = 3,
        *,
        record: Literal["last"],
        **options: Unpack[SampleKeywords],
    ) -> Tensor: ...
    @overload
    def sample(
        self,
        model: Model,
        image_size: int,
        batch_size: int = 8,
        channels: int = 3,
        *,
        record: Recorded = "all",
        **options: Unpack[SampleKeywords],
    ) -> list[np.ndarray]: ...
    @overload
    def sample(
        self,
        model: Model,
        image_size: int,
        batch_size: int = 8,
        channels: int = 3,
        *,
        record: str,
        **options: Unpack[SampleKeywords],
    ) -> list[np.ndarray] | Tensor: ...

    @lists_options_of(p_sample_loop)
    def sample(
        self,
        model: Model,
        image_size: int,
        batch_size: int = 8,
        channels: int = 3,
        *,
        record: str | int | Sequence[int] = "all",
        **options: Unpack[SampleKeywords],
    ) -> list[np.ndarray] | Tensor:
        """p_sample_loop for images of shape (batch_size, channels, image_size, image_size), with its options.

        Examples:
            >>> len(GaussianDiffusion(1000).sample(model, 8, batch_size=4, sampler="ddim", steps=5, progress=False))
            5
        """
        shape = (batch_size, channels, image_size, image_size)
        return self.p_sample_loop(model, shape, record=record, **options)
