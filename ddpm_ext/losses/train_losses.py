"""The loss that a model is trained with, in two launches beside the model's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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


class LossOptions(NamedTuple):
    """The options of GaussianDiffusion.train_losses, by the same names. A tuple, since torch.compile traces those."""

    loss: str = "mse"
    delta: float = 1.0
    weighting: str | Tensor = "simple"
    vlb_weight: float = 0.001
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    reduction: str = "mean"


def train_losses(
    process: Process,
    loss_rows: LossRows,
    model: Model,
    x_start: Tensor,
    t: int | Tensor,
    noise: Tensor | None,
    rng: Philox | None,
    options: LossOptions,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """See GaussianDiffusion.train_losses."""
    check_options(options.loss, options.delta, options.reduction, (*LOSSES, *BOUNDS))
    for name in ("vlb_weight", "offset_noise", "input_perturbation"):
        number = getattr(options, name)
        if type(number) is not float or not 0 <= number < math.inf:
            checks.nonnegative(name, number)
    variance, ops = process.variance_entry, process.ops
    kind, error, bound = options.loss, options.loss not in BOUNDS, None
    if variance.learned or not error:
        bound = bound_factor(process, variance, loss_rows, options)
        kind = kind if error else "mse"
    table = process.table("q_sample", "x_start", x_start)
    rows = loss_rows.get(options.weighting, x_start.device, table.dtype, error, bound)
    if noise is None and rng is None and (options.offset_noise or options.input_perturbation):
        rng = fresh_rng(x_start.device)  # which several launches share
    source: dict[str, Any] = {"noise": noise, "rng": rng}
    if options.offset_noise:
        source = {"noise": _offset_noise(process, x_start, t, noise, rng, options.offset_noise), "rng": None}
    variational = bound is not None
    step = ops.LossStep(
        x_start if variational or loss_rows.needs_x_start else None,
        rows,
        t,
        x_start.device,
        **source,
        loss=kind,
        delta=options.delta,
        reduction=options.reduction,
        variational=variational,
        detach_mean=variational and error,
    )
    keep_noise = loss_rows.needs_noise and not variance.learned and torch.is_grad_enabled()
    x_t = step.noised(x_start, table, keep_noise)
    if options.input_perturbation:
        perturbation = loss_rows.perturbation(options.input_perturbation, x_t.device, table.dtype)
        x_t = _perturbed(process, x_t, t, rng, perturbation)
    model_output = process.call_model(model, x_t, t, model_kwargs)
    mean = split_variance(x_start, model_output)[0] if variance.learned else model_output
    checks.like("model_output", mean, "x_start", x_start, lower=True)
    return step.loss(model_output)


def bound_factor(process: Process, variance: Variance, loss_rows: LossRows, options: LossOptions) -> float:
    """The factor of the variational bound's term, in nats, of a loss that includes it."""
    loss = options.loss
    if not variance.bound:
        raise ValueError(f"variance is {process.variance!r}, expected 'learned' or 'learned_range', which have a loss")
    if not loss_rows.bounded:
        raise ValueError(
            "alphas_cumprod ends at 0, where eps says nothing of x_0 and the bound is infinite, expected another "
            "schedule or prediction"
        )
    if loss not in BOUNDS:
        return options.vlb_weight * process.timesteps / math.log(2)
    if not isinstance(options.weighting, str) or options.weighting != "simple":
        raise ValueError(f"weighting is given beside loss {loss!r}, expected 'simple'")
    return (process.timesteps if loss == "rescaled_vlb" else 1) / math.log(2)


def _offset_noise(
    process: Process, x: Tensor, t: int | Tensor, noise: Tensor | None, rng: Philox | None, scale: float
) -> Tensor:
    """The noise of the forward process, plus one normal for each channel."""
    if noise is not None or rng is None:
        raise ValueError("offset_noise is given beside noise, expected noise that has its offset already")
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
    """x_t with more noise, by LossRows.perturbation."""
    out = None if x_t.requires_grad and torch.is_grad_enabled() else x_t
    rng = fresh_rng(x_t.device) if rng is None else rng
    return process.ops.forward_process(x_t, rows, t, rng=rng.of(STREAM_PERTURBATION, rng.draw), out=out)
