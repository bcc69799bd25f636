"""train_losses, the training loss of a model, usually in two kernel launches besides those of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Model
from ddpm_ext.losses.rows import LossRows
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES, check_options
from ddpm_ext.ops.noise import STREAM_OFFSET, STREAM_PERTURBATION, Philox, check_rng, fresh_rng
from ddpm_ext.process.model_output import split_variance
from ddpm_ext.process.process import Process
from ddpm_ext.tables.variances import Variance


class LossMethods(Process):
    """The training loss: a method of GaussianDiffusion."""

    _loss_rows: LossRows

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
        """The error of the model's prediction at x_t ~ q(x_t | x_0) (L_simple, Ho et al. 2020, eq. 14).

        One launch makes x_t, another the loss and its gradient. The second launch draws the noise again, if the caller
        does not pass it. In most training steps on a CPU, the first launch stores the noise instead, and the second
        overwrites it with the gradient.

        With a learned variance, the model returns twice the channels, and a term of the variational bound is added:
        L_simple + vlb_weight L_vlb, where L_vlb has no gradient in the mean (Nichol & Dhariwal 2021, eq. 16).

        Args:
            model: model(x_t, t, **model_kwargs) -> (batch, ...).
            x_start: (batch, ...), usually in [-1, 1].
            t: int64 (batch,) or int, in [0, timesteps).
            noise, rng: see q_sample.
            loss: "mse", "l1" or "huber". Or only the variational bound, with a gradient in the mean as well: "vlb" is
                the bound's term at t in bits per dimension, "rescaled_vlb" is `timesteps` times the term. The mean of
                "rescaled_vlb" over uniform t is the bound without the prior's term, which does not depend on the model.
            delta: the difference up to which "huber" is quadratic, above 0.
            weighting: the weight of each timestep's error. "simple" (all the same), "min_snr" (Hang et al. 2023) or
                another of ddpm_ext.tables.weightings. Or weights (timesteps,), which are read again after a write to
                them by torch. Writes through `.data` or numpy are not noticed. "vlb" and "rescaled_vlb" need "simple".
            vlb_weight: with a learned variance, the weight of L_vlb, which is `timesteps` times the bound's term at t,
                in bits per dimension. At least 0.
            offset_noise: standard deviation of the noise that all elements of a channel share, at least 0. Its stream
                is 4, also if rng has a stream. With an offset, the sum of both noises is stored in a tensor. `noise`
                must then be None, and x_start have channels, (batch, channels, ...).
            input_perturbation: standard deviation of further noise in x_t, relative to that of x_t's noise, at least 0
                (Ning et al. 2023, "Input perturbation reduces exposure bias"). The target does not have this noise,
                whose stream is 5, also if rng has a stream. It takes one more launch.
            reduction: "mean" or "sum" of the samples' losses, or "none".

        Returns:
            A scalar loss, or (batch,), float32 (float64 for float64 samples).

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range; the
                variance is "learned_variance", which has no loss; or the loss has a term of the bound, which is
                infinite for the prediction "eps" if alphas_cumprod ends at 0.

        Examples:
            >>> gd = GaussianDiffusion(1000)
            >>> gd.train_losses(model, images, torch.tensor([0, 9, 500, 999]), loss="l1", reduction="none").shape
            torch.Size([4])
        """
        check_options(loss, delta, reduction, (*LOSSES, *BOUNDS))
        numbers = {"vlb_weight": vlb_weight, "offset_noise": offset_noise, "input_perturbation": input_perturbation}
        for name, number in numbers.items():
            if type(number) is not float or not 0 <= number < math.inf:
                checks.nonnegative(name, number)
        variance, ops = self.variance_entry, self.ops
        error_kind, has_error, bound = loss, loss not in BOUNDS, None
        if variance.learned or not has_error:
            bound = self._bound_factor(variance, loss, weighting, vlb_weight)
            error_kind = error_kind if has_error else "mse"
        table = self.table("q_sample", "x_start", x_start)
        rows = self._loss_rows.get(weighting, x_start.device, table.dtype, has_error, bound)
        if noise is None and rng is None and (offset_noise or input_perturbation):
            rng = fresh_rng(x_start.device)  # one seed for all launches of this call
        source: dict[str, Any] = {"noise": noise, "rng": rng}
        if offset_noise:
            source = {"noise": _offset_noise(self, x_start, t, noise, rng, offset_noise), "rng": None}
        variational = bound is not None
        step = ops.LossStep(
            x_start if variational or self._loss_rows.needs_x_start else None,
            rows,
            t,
            x_start.device,
            **source,
            loss=error_kind,
            delta=delta,
            reduction=reduction,
            variational=variational,
            detach_mean=variational and has_error,
        )
        keep_noise = self._loss_rows.needs_noise and not variance.learned and torch.is_grad_enabled()
        x_t = step.noised(x_start, table, keep_noise)
        if input_perturbation:
            perturbation = self._loss_rows.perturbation(input_perturbation, x_t.device, table.dtype)
            x_t = _perturbed(self, x_t, t, rng, perturbation)
        model_output = self.call_model(model, x_t, t, model_kwargs)
        mean = split_variance(x_start, model_output)[0] if variance.learned else model_output
        checks.like("model_output", mean, "x_start", x_start, lower=True)
        return step.loss(model_output)

    def _bound_factor(self, variance: Variance, loss: str, weighting: str | Tensor, vlb_weight: float) -> float:
        """The factor by which a loss with the variational bound multiplies the bound's term in nats.

        Raises ValueError if the bound cannot train a model for this variance, or is infinite for this schedule and
        prediction, or if a loss that is only the bound has a weighting.
        """
        if not variance.bound:
            raise ValueError(f"variance is {self.variance!r}, expected 'learned' or 'learned_range', which have a loss")
        if not self._loss_rows.bounded:
            raise ValueError(
                "alphas_cumprod ends at 0, where eps says nothing of x_0 and the bound is infinite, expected another "
                "schedule or prediction"
            )
        if loss not in BOUNDS:
            return vlb_weight * self.timesteps / math.log(2)
        if not isinstance(weighting, str) or weighting != "simple":
            raise ValueError(f"weighting is given with loss {loss!r}, expected 'simple'")
        return (self.timesteps if loss == "rescaled_vlb" else 1) / math.log(2)


def _offset_noise(
    process: Process, x: Tensor, t: int | Tensor, noise: Tensor | None, rng: Philox | None, scale: float
) -> Tensor:
    """The noise of the forward process, plus `scale` times one normal number for each channel of each sample.

    Raises ValueError for a caller's `noise`, whose offset the caller should add, and for samples without channels.
    """
    if noise is not None or rng is None:
        raise ValueError("offset_noise is given with noise, expected noise that has its offset already")
    check_rng(rng)
    if x.dim() < 2:
        raise ValueError(f"offset_noise: x_start has shape {tuple(x.shape)}, expected (batch, channels, ...)")
    table = process.table("noise", "x_start", x)
    with torch.no_grad():
        offset_rng = rng.of(STREAM_OFFSET, rng.draw)
        offsets = process.ops.forward_process(x.new_zeros(x.shape[:2]), table, t, rng=offset_rng)
        noise = process.ops.forward_process(torch.zeros_like(x), table, t, rng=rng)
        return noise.add_(offsets.reshape(*offsets.shape, *[1] * (x.dim() - 2)), alpha=scale)


def _perturbed(process: Process, x_t: Tensor, t: int | Tensor, rng: Philox | None, rows: Tensor) -> Tensor:
    """x_t plus the noise of an input perturbation, written to x_t unless x_t requires a gradient.

    Args:
        rows: the result of LossRows.perturbation.
    """
    out = None if x_t.requires_grad and torch.is_grad_enabled() else x_t
    rng = fresh_rng(x_t.device) if rng is None else rng
    return process.ops.forward_process(x_t, rows, t, rng=rng.of(STREAM_PERTURBATION, rng.draw), out=out)
