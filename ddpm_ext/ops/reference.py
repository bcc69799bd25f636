"""The operators in plain torch: slow and simple, for any float dtype.

Tests compare the compiled operators with these functions, and `backend="reference"` runs them.
Each function has the name and the arguments of its twin in `ops`. Arithmetic and tables are float64 for float64 samples
and float32 for samples of all other dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.ops.gaussians import discretized_gaussian_log_likelihood
from ddpm_ext.ops.loss_kinds import check_options
from ddpm_ext.ops.noise import STREAM_FORWARD, Philox, fresh_rng
from ddpm_ext.ops.reference_inputs import affine, check_noise, check_samples, columns, finish, resolve_noise
from ddpm_ext.ops.reference_inputs import randn as randn
from ddpm_ext.ops.reference_scales import output_scale, x_start_scale
from ddpm_ext.ops.reference_steps import check_plain_step, reverse_step, step_with_options
from ddpm_ext.ops.table_step import CalledTableStep, operators_by_name


class TableStep(CalledTableStep):
    """Twin of ops.TableStep."""

    operators = operators_by_name(reverse_step, step_with_options, output_scale, x_start_scale)

    def check(self, x_t: Tensor, row: Tensor | None, index: int, out: Tensor | None = None) -> None:
        noise, rng = self._arguments["noise"], self._arguments["rng"]
        check_plain_step(x_t, self._table, index if row is None else row, noise, rng, out)


def forward_process(
    x_start: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    add_noise: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """k0 x_start + k1 z. Twin of ops.forward_process."""
    check_samples("x_start", x_start, table, t, {"noise": noise, "out": out})
    check_noise(x_start, noise, rng, add_noise)
    dtype = checks.compute_dtype(x_start.dtype)
    k0, k1 = columns(table.to(dtype), t, x_start)
    x_t = k0 * x_start.to(dtype)
    if add_noise or noise is not None or rng is not None:
        x_t = x_t + k1 * resolve_noise(x_start, noise, rng, STREAM_FORWARD, t)
    return finish(x_t, x_start, out)


def _affine(x: Tensor, y: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    dtype = checks.compute_dtype(x.dtype)
    k0, k1 = columns(table.to(dtype), t, x)
    return finish(affine(k0, x.to(dtype), k1, y.to(dtype)), x, None)


def predict_start(x_t: Tensor, noise: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_t + k1 noise. Twin of ops.predict_start."""
    check_samples("x_t", x_t, table, t, {"noise": noise}, lower="noise")
    return _affine(x_t, noise, table, t)


def posterior_mean(x_start: Tensor, x_t: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_start + k1 x_t. Twin of ops.posterior_mean."""
    check_samples("x_start", x_start, table, t, {"x_t": x_t}, lower="x_t")
    return _affine(x_start, x_t, table, t)


def diffusion_loss(
    model_output: Tensor,
    x_start: Tensor | None,
    table: Tensor,
    t: int | Tensor,
    *,
    loss: str = "mse",
    delta: float = 1.0,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    reduction: str = "mean",
    variational: bool = False,
    detach_mean: bool = False,
) -> Tensor:
    """Twin of ops.diffusion_loss. It is float64 for float64 samples, and twice differentiable in all tensors."""
    checks.tensor("model_output", model_output)
    variance = None
    if variational:
        if x_start is None:
            raise ValueError("x_start is missing, expected a tensor with variational")
        checks.tensor("x_start", x_start)
        if model_output.dim() > 1 and x_start.dim() > 1 and model_output.shape[1] == 2 * x_start.shape[1]:
            model_output, variance = model_output.chunk(2, 1)
    x = model_output if x_start is None and noise is None else noise if x_start is None else x_start
    name = "model_output" if x is model_output else "noise" if x_start is None else "x_start"
    assert x is not None
    check_options(loss, delta, reduction)
    others = {"model_output": model_output, "x_start": x_start, "noise": noise}
    check_samples(name, x, table, t, others, lower="model_output")
    check_noise(x, noise, rng, add_noise=True)
    if noise is None and rng is None:
        raise ValueError("noise and rng are both None, expected the one that made the model's input")
    dtype = checks.compute_dtype(x.dtype)
    k0, k1, weight, *row = columns(table.to(dtype), t, x)
    target = k1 * resolve_noise(x, noise, rng, STREAM_FORWARD, t)
    if x_start is not None:
        target = target + k0 * x_start.to(dtype)
    d = model_output.to(dtype) - target
    if loss == "mse":
        values = d**2
    elif loss == "l1":
        values = d.abs()
    else:
        values = torch.nn.functional.huber_loss(d, torch.zeros_like(d), reduction="none", delta=delta)
    values = weight * values
    if variational:
        d = d.detach() if detach_mean else d
        values = values + _bound(x.to(dtype), d, 0.0 if variance is None else variance.to(dtype), row)
    losses = values.flatten(1).mean(1) if x.dim() > 1 else values
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


class LossStep:
    """Twin of ops.loss.LossStep. It does not store drawn noise: both methods draw it."""

    def __init__(
        self,
        x_start: Tensor | None,
        table: Tensor,
        t: int | Tensor,
        device: torch.device,
        *,
        noise: Tensor | None,
        rng: Philox | None,
        **options: Any,
    ) -> None:
        source = {"noise": noise, "rng": fresh_rng(device) if noise is None and rng is None else rng}
        self._forward: dict[str, Any] = {"t": t, **source}
        self._arguments: dict[str, Any] = {"x_start": x_start, "table": table, **self._forward, **options}

    def noised(self, x_start: Tensor, table: Tensor, keep_noise: bool) -> Tensor:
        return forward_process(x_start, table, **self._forward)

    def loss(self, model_output: Tensor) -> Tensor:
        return diffusion_loss(model_output, **self._arguments)


def _bound(x_start: Tensor, d: Tensor, v: Tensor | float, row: Sequence[Tensor]) -> Tensor:
    """The weight times each element's term of the variational bound: Ho et al. 2020, eq. (5); eq. (13) at timestep 0.

    Args:
        d: the model's output minus its target.
        v: the model's output for its variance, or 0.
        row: weight, l0, l1, scale and decoder, each (batch, 1, ...): see csrc/core/loss.h. decoder is 1 at timestep 0.
    """
    weight, l0, l1, scale, decoder = row
    # The model's log-variance at timestep 0; its difference from the posterior's log-variance at other timesteps.
    log_variance = l0 + l1 * v
    g = -log_variance.clamp(-88, 87)
    divergence = (g.expm1() - g + g.exp() * scale * d**2) / 2
    likelihood = discretized_gaussian_log_likelihood(x_start, mean=x_start + scale * d, log_scale=log_variance / 2)
    return weight * torch.where(decoder != 0, -likelihood, divergence)
