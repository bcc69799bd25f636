"""GaussianDiffusion: the tutorial's class, with each of its steps in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_ext import checks, ops, reference, sampling
from ddpm_ext.noise import Philox, fresh_rng
from ddpm_ext.samplers import VARIANCES, ddpm
from ddpm_ext.schedules import make_betas
from ddpm_ext.spacing import make_grid
from ddpm_ext.step_table import StepTable
from ddpm_ext.tables import PREDICTIONS, DeviceTables, prediction_coefficients

__all__ = ["GaussianDiffusion"]

Model = Callable[[Tensor, Tensor], Any]

BACKENDS: dict[str, ModuleType] = {"fused": ops, "reference": reference}


class GaussianDiffusion:
    """A Gaussian diffusion over `timesteps` steps: forward process, reverse process and loss (Ho et al. 2020).

    Args:
        timesteps: steps of the forward process, at least 1.
        beta_schedule: "linear", "cosine", "sigmoid", "scaled_linear", or betas of shape (timesteps,) in (0, 1), of
            which the last may be 1.
        prediction: what the model's output is: the noise "eps", the clean sample "x0", or
            "v" = sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x0.
        variance: of a reverse step, "fixed_small" (the posterior's) or "fixed_large" (beta).
        backend: "fused" (float32, float16, bfloat16) or "reference" (plain torch, any float dtype).

    Everywhere, samples have shape (batch, ...); `t` is int64 of shape (batch,) on the samples' device, or an int for
    all samples (a tensor on a GPU is not read back: values out of range count as the nearest); `model(x_t, t)` gives a
    tensor of x_t's shape (or an object that holds it as `.sample`) and must not write to its arguments, which are views
    and buffers that later steps use again.

    Attributes:
        betas, alphas, alphas_cumprod, alphas_cumprod_prev, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
        log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod, posterior_variance,
        posterior_log_variance_clipped, posterior_mean_coef1, posterior_mean_coef2: float64 (timesteps,), on the CPU.

    Raises:
        TypeError, ValueError: an argument of another type, an unknown name, or out of range. "learned" variances are
            not supported yet and refused.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_schedule: str | Tensor = "linear",
        *,
        prediction: str = "eps",
        variance: str = "fixed_small",
        backend: str = "fused",
    ) -> None:
        self.betas = betas = make_betas(beta_schedule, timesteps)
        self.timesteps = len(betas)
        self.prediction: str = checks.one_of("prediction", prediction, PREDICTIONS)
        if variance in ("learned", "learned_range"):
            raise ValueError(f"variance is {variance!r}, which is not supported yet, expected one of {VARIANCES}")
        self.variance: str = checks.one_of("variance", variance, VARIANCES)
        self.backend: str = checks.one_of("backend", backend, BACKENDS)

        self.alphas = 1 - betas
        self.alphas_cumprod = alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)

        # q(x_t | x_0), eq. (4) of Ho et al. 2020, and its inverse
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - alphas_cumprod).log()
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt()

        # q(x_{t-1} | x_t, x_0), eq. (6) and (7); its variance at t = 0 is 0, whose log is clipped
        self.posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_log_variance_clipped = self.posterior_variance.clamp(min=1e-20).log()
        self.posterior_mean_coef1 = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - alphas_cumprod_prev) * self.alphas.sqrt() / (1 - alphas_cumprod)

        self._tables = self._make_tables()
        self._loops: dict[object, tuple[DeviceTables, StepTable]] = {}  # p_sample_loop's: see sampling.make_tables

    def __repr__(self) -> str:
        return (
            f"GaussianDiffusion(timesteps={self.timesteps}, prediction={self.prediction!r}, "
            f"variance={self.variance!r}, backend={self.backend!r})"
        )

    # ------------------------------------------------------------------------------------------------- tables

    @property
    def _ops(self) -> ModuleType:
        return BACKENDS[self.backend]

    def _make_tables(self) -> DeviceTables:
        zeros, ones = torch.zeros_like(self.betas), torch.ones_like(self.betas)
        grid = make_grid(self.alphas_cumprod, torch.arange(self.timesteps - 1, -1, -1), betas=self.betas)
        descending = ddpm(grid, prediction=self.prediction, variance=self.variance)
        # what a model of this prediction is trained towards: k0 x_start + k1 noise
        target = {
            "eps": (zeros, ones),
            "x0": (ones, zeros),
            "v": (-self.sqrt_one_minus_alphas_cumprod, self.sqrt_alphas_cumprod),
        }[self.prediction]
        variance, log_variance = self.posterior_variance, self.posterior_log_variance_clipped
        if self.variance == "fixed_large":  # at t = 0 the posterior's at t = 1, so that the log-likelihood is finite
            first = self.posterior_variance[1:2] if self.timesteps > 1 else self.betas
            variance = torch.cat([first, self.betas[1:]])
            log_variance = variance.log()
        return DeviceTables(
            descending[::-1],  # row t is timestep t
            q_sample=torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], 1),
            predict_start_from_noise=torch.stack(prediction_coefficients(self.alphas_cumprod, "eps"), 1),
            posterior_mean=torch.stack([self.posterior_mean_coef1, self.posterior_mean_coef2], 1),
            target=torch.stack(target, 1),
            q_variance=1 - self.alphas_cumprod,
            q_log_variance=self.log_one_minus_alphas_cumprod,
            posterior_variance=self.posterior_variance,
            posterior_log_variance_clipped=self.posterior_log_variance_clipped,
            p_variance=variance,
            p_log_variance=log_variance,
        )

    def _table(self, name: str, x_name: str, x: Tensor) -> Tensor:
        """A table for the operators, on x's device; float64 for the reference's float64 samples."""
        checks.tensor(x_name, x)
        double = x.dtype == torch.float64 and self.backend == "reference"
        return self._tables.get(name, x.device, torch.float64 if double else torch.float32)

    def _extract(self, name: str, t: int | Tensor, x: Tensor) -> Tensor:
        """A table's values at t, of shape (batch, 1, ...), float32 (float64 for float64 samples)."""
        values = self._tables.get(name, x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        picked = values[t] if isinstance(t, Tensor) else values[t].expand(len(x))
        return picked.reshape(len(x), *[1] * (x.dim() - 1))

    def _call(self, model: Model, x: Tensor, t: int | Tensor) -> Tensor:
        """The model's output; an int t goes to it as a view of a table, which costs no launch."""
        if not isinstance(t, Tensor):
            t = self._tables.timesteps(x.device)[t].expand(len(x))
        return sampling.unwrap(model(x, t))

    # ---------------------------------------------------------------------------------------- forward process

    def q_sample(
        self,
        x_start: Tensor,
        t: int | Tensor,
        noise: Tensor | None = None,
        *,
        rng: Philox | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_t ~ q(x_t | x_0): sqrt(alphas_cumprod) x_start + sqrt(1 - alphas_cumprod) noise (eq. 4).

        Args:
            x_start: (batch, ...), in [-1, 1] by custom.
            t: int64 (batch,) or int, in [0, timesteps).
            noise: as x_start; None: drawn by `rng` (stream 2, draw t), or by a seed from torch's default generator.
            out: as x_start: where the result goes; x_start itself is fine. No gradients then.

        Returns:
            x_t, as x_start. Differentiable in x_start and noise.

        Raises:
            TypeError, ValueError: an argument of another type, shape, dtype or device, or out of range.
        """
        table = self._table("q_sample", "x_start", x_start)
        return self._ops.forward_process(x_start, table, t, noise=noise, rng=rng, out=out)

    def q_mean_variance(self, x_start: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (eq. 4).

        Returns:
            mean as x_start; variance and log-variance of shape (batch, 1, ...).
        """
        mean = self._ops.forward_process(x_start, self._table("q_sample", "x_start", x_start), t, add_noise=False)
        return (
            mean,
            self._extract("q_variance", t, x_start),
            self._extract("q_log_variance", t, x_start),
        )

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (eq. 6 and 7).

        Returns:
            mean as x_start; variance and log-variance of shape (batch, 1, ...), the latter at least ln 1e-20.
        """
        mean = self._ops.posterior_mean(x_start, x_t, self._table("posterior_mean", "x_start", x_start), t)
        return (
            mean,
            self._extract("posterior_variance", t, x_start),
            self._extract("posterior_log_variance_clipped", t, x_start),
        )

    def predict_start_from_noise(self, x_t: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """The x_0 of which x_t is made with this noise: the inverse of q_sample.

        Where alphas_cumprod is 0 there is none: the result is 2^100 (x_t - noise), whose sign alone means something.
        """
        return self._ops.predict_start(x_t, noise, self._table("predict_start_from_noise", "x_t", x_t), t)

    # ---------------------------------------------------------------------------------------- reverse process

    def p_mean_variance(
        self, model: Model, x_t: Tensor, t: int | Tensor, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), by the model's prediction.

        Args:
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1].

        Returns:
            mean as x_t, differentiable in x_t and through the model; variance and log-variance of shape
            (batch, 1, ...).
        """
        table = self._table("steps", "x_t", x_t)
        self._ops.check_reverse_step(x_t, table, t)
        model_output = self._call(model, x_t, t)
        clip = (-1.0, 1.0) if clip_denoised else None
        mean = self._ops.reverse_step(x_t, model_output, table, t, clip=clip, add_noise=False)
        return mean, self._extract("p_variance", t, x_t), self._extract("p_log_variance", t, x_t)

    @torch.no_grad()
    def p_sample(
        self,
        model: Model,
        x_t: Tensor,
        t: int | Tensor,
        clip_denoised: bool = True,
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
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1].
            noise: as x_t; None: drawn by `rng` (stream 0, draw t), or by a seed from torch's default generator.
            out: as x_t: where the result goes; x_t itself is fine.

        Returns:
            x_{t-1}, as x_t, without gradients; at t = 0 no noise is added.

        Raises:
            TypeError, ValueError: an argument of another type, shape, dtype or device, or out of range.
        """
        table = self._table("steps", "x_t", x_t)
        self._ops.check_reverse_step(x_t, table, t, noise=noise, rng=rng, out=out)
        model_output = self._call(model, x_t, t)
        clip = (-1.0, 1.0) if clip_denoised else None
        return self._ops.reverse_step(x_t, model_output, table, t, clip=clip, noise=noise, rng=rng, out=out)

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
        clip_denoised: bool = True,
        start: Tensor | None = None,
        strength: float = 1.0,
        rng: Philox | None = None,
        record: str | int | Sequence[int] = "all",
        callback: Callable[[sampling.Record], object] | None = None,
        progress: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[np.ndarray] | Tensor:
        """From pure noise to samples: algorithm 2, or DDIM's (Song et al. 2021).

        Args:
            model: model(x_t, t) -> (batch, ...). It sees two buffers in turn: what it wants to keep, it must copy.
            shape: (batch, ...).
            sampler: "ddpm", "ddim", "euler" or "euler_ancestral" (see ddpm_ext.samplers); or a StepTable, whose rows it
                takes as they are.
            steps: how many of the timesteps; None: all.
            spacing: which of them, "linspace" (evenly, with both ends), "leading", "trailing", "quadratic", "ddim25" or
                "10,15,20" and the like (see ddpm_ext.spacing); "karras" and "log_snr" go between them, and the model
                gets float32 timesteps.
            timesteps: these instead, int64, descending.
            eta: ddim's and euler_ancestral's noise, 0 (none) to 1 (as much as ddpm) and beyond; None: 0 for ddim, 1 for
                euler_ancestral.
            clip_denoised: whether the predicted x_0 is clipped to [-1, 1] in each step.
            start: `shape`, samples to begin from instead of pure noise: they get the noise of the first step taken
                (stream 1, as pure noise does), and `strength` of the steps, the last, take it away (Meng et al. 2022,
                "SDEdit").
            strength: 0 (exclusive, at least one step) to 1, how many of the steps; without a start all.
            rng: seed and sample ids; None: a seed from torch's default CPU generator. One with a draw or a stream of
                its own is refused: it would give each step the same noise.
            record: "all": each step's samples; an int k: every k-th step's and the last; a list of ints: those steps',
                0 the first; "last": the last alone.
            callback: called with a Record (step, timestep, x) after each step; the loop ends there if it returns true.
            progress: whether to show a progress bar (where tqdm is installed).
            device: where to sample; None: where the model's parameters are, else the CPU.
            dtype: of the samples.

        Returns:
            A list of numpy arrays of `shape` (bfloat16 as float32), or with record="last" a tensor.

        Raises:
            TypeError, ValueError: an argument of another type, an unknown name, or out of range.
        """
        return sampling.loop(
            self._ops,
            model,
            shape,
            sampling.make_tables(self, sampler, steps, spacing, timesteps, eta),
            clip=(-1.0, 1.0) if clip_denoised else None,
            start=start,
            strength=strength,
            rng=rng,
            record=record,
            callback=callback,
            progress=progress,
            device=device,
            dtype=dtype,
        )

    def sample_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        sampler: str | StepTable = "ddpm",
        steps: int | None = None,
        spacing: str = "linspace",
        timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        clip_denoised: bool = True,
        **options: Any,
    ) -> Iterator[sampling.Record]:
        """p_sample_loop, step by step: a Record (step, timestep, x) after each, taken when it is asked for.

        x is one of two buffers that the loop goes on writing to: what is to last must be copied. Gradients are not
        recorded.

        Args: as p_sample_loop's, but for record and callback; `options` are start, strength, rng, progress (by default
            off), device and dtype. They are checked at once.

        Raises: as p_sample_loop.
        """
        tables = sampling.make_tables(self, sampler, steps, spacing, timesteps, eta)
        clip = (-1.0, 1.0) if clip_denoised else None
        return sampling.walk(self._ops, model, shape, tables, clip=clip, **options)

    def sample(
        self, model: Model, image_size: int, batch_size: int = 8, channels: int = 3, **options: Any
    ) -> list[np.ndarray] | Tensor:
        """Images of shape (batch_size, channels, image_size, image_size): p_sample_loop, and its options."""
        return self.p_sample_loop(model, (batch_size, channels, image_size, image_size), **options)

    # ----------------------------------------------------------------------------------------------- training

    def train_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: int | Tensor,
        noise: Tensor | None = None,
        *,
        rng: Philox | None = None,
    ) -> Tensor:
        """Mean squared error of the model's prediction at x_t ~ q(x_t | x_0) (L_simple, eq. 14).

        Args:
            x_start: (batch, ...), in [-1, 1] by custom.
            t: int64 (batch,) or int, in [0, timesteps).
            noise, rng: as in q_sample.

        Returns:
            A scalar loss, float32 (float64 for float64 samples).
        """
        if noise is None and rng is None:
            rng = fresh_rng()
        x_t = self.q_sample(x_start, t, noise, rng=rng)
        if self.prediction == "x0":
            target = x_start
        elif self.prediction == "eps" and noise is not None:
            target = noise
        else:  # drawn noise is drawn again
            table = self._table("target", "x_start", x_start)
            target = self._ops.forward_process(x_start, table, t, noise=noise, rng=rng)
        model_output = self._call(model, x_t, t)
        checks.like("model_output", model_output, "x_start", x_start, lower=True)
        dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
        return ops.mse_loss(model_output.to(dtype), target.to(dtype))
