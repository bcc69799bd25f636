"""The forward process of a Gaussian diffusion, and the losses of a model that learns to take it back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_ext import ops, reference
from ddpm_ext.base import checks
from ddpm_ext.base.types import Model
from ddpm_ext.loop.rows import LEARNED, LoopTables
from ddpm_ext.losses.rows import ERROR, Counts, LossTables
from ddpm_ext.ops.loss import refuse_grad
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES, check_options
from ddpm_ext.ops.noise import STREAM_OFFSET, STREAM_PERTURBATION, Philox, check_rng, fresh_rng
from ddpm_ext.process.model_output import split_variance, unwrap
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.predictions import prediction_coefficients
from ddpm_ext.tables.samplers import PREDICTIONS, VARIANCES, ddpm
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.spacing import make_grid
from ddpm_ext.tables.step_table import StepTable

__all__ = ["ForwardProcess"]


BACKENDS: dict[str, ModuleType] = {"fused": ops, "reference": reference}


class ForwardProcess:
    """q(x_t | x_0), the tables of a GaussianDiffusion, and its losses. Arguments and attributes: see there."""

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
        learned, fixed = (
            self._tables.get(name, betas.device, betas.dtype)
            for name in ("learned_log_variance", "finite_log_variance")
        )
        of_output = learned if self.variance in LEARNED else torch.stack([fixed, torch.zeros_like(fixed)], 1)
        self._losses = LossTables(self, of_output)
        self._loops: dict[object, tuple[LoopTables, StepTable]] = {}  # p_sample_loop's: see loop_tables.make_tables

    def __repr__(self) -> str:
        return (
            f"GaussianDiffusion(timesteps={self.timesteps}, prediction={self.prediction!r}, "
            f"variance={self.variance!r}, backend={self.backend!r})"
        )

    # ------------------------------------------------------------------------------------------------- tables

    @property
    def _ops(self) -> ModuleType:
        return BACKENDS[self.backend]

    def _make_tables(self) -> StepDeviceTables:
        grid = make_grid(self.alphas_cumprod, torch.arange(self.timesteps - 1, -1, -1, device="cpu"), betas=self.betas)
        descending = ddpm(grid, prediction=self.prediction, variance=self.variance)
        large = self.variance == "fixed_large"
        # at t = 0 the posterior's at t = 1, so that the log-likelihood is finite
        first = self.posterior_variance[1:2] if self.timesteps > 1 else self.betas
        finite = torch.cat([first, (self.betas if large else self.posterior_variance)[1:]])
        return StepDeviceTables(
            descending[::-1],  # row t is timestep t
            q_sample=torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], 1),
            noise=torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu").expand(self.timesteps, 2),
            predict_start_from_noise=torch.stack(prediction_coefficients(self.alphas_cumprod, "eps"), 1),
            posterior_mean=torch.stack([self.posterior_mean_coef1, self.posterior_mean_coef2], 1),
            q_variance=1 - self.alphas_cumprod,
            q_log_variance=self.log_one_minus_alphas_cumprod,
            posterior_variance=self.posterior_variance,
            posterior_log_variance_clipped=self.posterior_log_variance_clipped,
            p_variance=finite if large else self.posterior_variance,
            p_log_variance=finite.log() if large else self.posterior_log_variance_clipped,
            finite_log_variance=finite.log(),
            learned_log_variance=2 * torch.stack([descending.l0, descending.l1], 1).flip(0),
        )

    def _table(self, name: str, x_name: str, x: Tensor) -> Tensor:
        """A table for the operators, on x's device; float64 for the reference's float64 samples."""
        checks.tensor(x_name, x)
        return self._tables.get(name, x.device, self._operator_dtype(x))

    def _operator_dtype(self, x: Tensor) -> torch.dtype:
        """Of the tables that the operators take beside x: the fused ones know no float64."""
        return checks.compute_dtype(x.dtype) if self.backend == "reference" else torch.float32

    def _extract(self, name: str, t: int | Tensor, x: Tensor) -> Tensor:
        """A table's values at t, of shape (batch, 1, ...), float32 (float64 for float64 samples)."""
        values = self._tables.get(name, x.device, checks.compute_dtype(x.dtype))
        return like_samples(values, t, x)

    def _call(self, model: Model, x: Tensor, t: int | Tensor, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The model's output; an int t goes to it as a view of a table, which costs no launch."""
        if not isinstance(t, Tensor):
            t = self._tables.timesteps(x.device)[t].expand(len(x))
        return unwrap(model(x, t, **(kwargs or {})))

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

    # ----------------------------------------------------------------------------------------------- training

    def train_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: int | Tensor,
        noise: Tensor | None = None,
        *,
        rng: Philox | None = None,
        loss: str = "mse",
        delta: float = 1.0,
        weighting: str | Tensor = "simple",
        vlb_weight: float = 0.001,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        reduction: str = "mean",
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The error of the model's prediction at x_t ~ q(x_t | x_0) (L_simple, eq. 14), in two launches beside the
        model's: one makes x_t, one the loss and its slope. Drawn noise is not kept, but drawn again.

        Where the variance is learned, a term of the variational bound comes to it, L_simple + vlb_weight L_vlb with the
        mean detached (Nichol & Dhariwal 2021, eq. 16); `model` has twice the channels then.

        Args:
            model: model(x_t, t, **model_kwargs) -> (batch, ...).
            x_start: (batch, ...), in [-1, 1] by custom.
            t: int64 (batch,) or int, in [0, timesteps).
            noise, rng: as in q_sample.
            loss, delta: "mse", "l1" or "huber", which is square up to delta; or of the bound alone, mean and all, its
                term "vlb", in bits per dimension, or "rescaled_vlb", that times `timesteps`: its mean over uniform t
                is the bound, but for the prior's term, which no model changes.
            weighting: how much each timestep's error counts: "simple" (all the same), "min_snr" (Hang et al. 2023) or
                another of ddpm_ext.weightings; or weights (timesteps,), which are read anew when torch has written to
                them (other writers go unseen).
            vlb_weight: of the bound, in bits per dimension, where the variance is learned; at least 0.
            offset_noise: standard deviation of what is added to the noise of all elements of a channel (stream 4,
                whatever rng's own is), at least 0. The noise is made as a tensor then.
            input_perturbation: standard deviation of further noise in x_t alone (stream 5, whatever rng's own is), over
                that of its noise, at least 0: Ning et al. 2023, "Input perturbation reduces exposure bias". One launch
                more.
            reduction: "mean" or "sum" of the samples' losses, or "none".

        Returns:
            A scalar loss, or (batch,), float32 (float64 for float64 samples).

        Raises:
            TypeError, ValueError: an argument of another type, shape, dtype or device, or out of range.
        """
        kind, counts = self._counts(loss, weighting, vlb_weight)
        check_options(kind, delta, reduction)
        for name, value in (("offset_noise", offset_noise), ("input_perturbation", input_perturbation)):
            checks.nonnegative(name, value)
        table = self._table("q_sample", "x_start", x_start)
        rows = self._losses.get(weighting, x_start.device, self._operator_dtype(x_start), counts)
        if noise is None and rng is None:
            rng = fresh_rng()
        elif rng is not None:
            check_rng(rng)
        source: dict[str, Any] = {"noise": noise, "rng": rng}
        if offset_noise:
            source = {"noise": self._offset(x_start, t, noise, rng, offset_noise)}
        x_t = self._ops.forward_process(x_start, table, t, **source)
        variational = counts.bound is not None
        target = x_start if variational or self.prediction != "eps" else None
        if self.backend == "fused":
            refuse_grad(target, noise)
        if input_perturbation:
            x_t = self._perturb(x_t, t, rng, input_perturbation)
        model_output = self._call(model, x_t, t, model_kwargs)
        mean = split_variance(x_start, model_output)[0] if self.variance in LEARNED else model_output
        checks.like("model_output", mean, "x_start", x_start, lower=True)
        return self._ops.diffusion_loss(
            model_output,
            target,
            rows,
            t,
            loss=kind,
            delta=delta,
            reduction=reduction,
            variational=variational,
            detach_mean=variational and counts.error,
            **source,
        )

    def _counts(self, loss: str, weighting: str | Tensor, vlb_weight: float) -> tuple[str, Counts]:
        """How far the model's error is told, and what counts."""
        checks.one_of("loss", loss, (*LOSSES, *BOUNDS))
        checks.nonnegative("vlb_weight", vlb_weight)
        learned = self.variance in LEARNED
        if loss not in BOUNDS and not learned:
            return loss, ERROR
        if self.variance == "learned_variance":
            raise ValueError("variance is 'learned_variance', expected 'learned' or 'learned_range', which have a loss")
        if not self._losses.bounded:
            raise ValueError(
                "alphas_cumprod ends at 0, where eps says nothing of x_0 and the bound is infinite, expected another "
                "schedule or prediction"
            )
        if loss not in BOUNDS:
            return loss, Counts(bound=vlb_weight * self.timesteps / math.log(2))
        if not isinstance(weighting, str) or weighting != "simple":
            raise ValueError(f"weighting is given beside loss {loss!r}, expected 'simple'")
        return "mse", Counts(error=False, bound=(self.timesteps if loss == "rescaled_vlb" else 1) / math.log(2))

    def _offset(self, x: Tensor, t: int | Tensor, noise: Tensor | None, rng: Philox | None, scale: float) -> Tensor:
        """The noise of forward_process, moved by one normal a channel."""
        if noise is not None or rng is None:
            raise ValueError("offset_noise is given beside noise, expected noise that is moved already")
        if x.dim() < 2:
            raise ValueError(f"offset_noise: x_start has shape {tuple(x.shape)}, expected (batch, channels, ...)")
        table = self._table("noise", "x_start", x)
        with torch.no_grad():
            moves = self._ops.forward_process(x.new_zeros(x.shape[:2]), table, t, rng=rng.of(STREAM_OFFSET, rng.draw))
            noise = self._ops.forward_process(torch.zeros_like(x), table, t, rng=rng)
            return noise.add_(moves.reshape(*moves.shape, *[1] * (x.dim() - 2)), alpha=scale)

    def _perturb(self, x_t: Tensor, t: int | Tensor, rng: Philox | None, scale: float) -> Tensor:
        """x_t with more noise, by `scale` of what it has."""
        rows = self._losses.perturbation(scale, x_t.device, self._operator_dtype(x_t))
        out = None if x_t.requires_grad and torch.is_grad_enabled() else x_t
        rng = fresh_rng() if rng is None else rng
        return self._ops.forward_process(x_t, rows, t, rng=rng.of(STREAM_PERTURBATION, rng.draw), out=out)


def like_samples(values: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
    """values[t], of shape (batch, 1, ...)."""
    picked = values[t] if isinstance(t, Tensor) else values[t].expand(len(x))
    return picked.reshape(len(x), *[1] * (x.dim() - 1))
