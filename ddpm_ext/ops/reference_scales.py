"""The twins of the operators in scales.py, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.ops.reference_inputs import affine, check_samples, check_scale
from ddpm_ext.ops.reference_steps import guided_output
from ddpm_ext.ops.row import row_numbers


def x_start_scale(
    x_t: Tensor,
    model_output: Tensor | None = None,
    table: Tensor | None = None,
    t: int | Tensor = 0,
    *,
    quantile: float,
    maximum: float = math.inf,
    uncond_output: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Twin of ops.x_start_scale; for float64 samples float64 (batch,)."""
    checks.samples("x_t", x_t)
    if (model_output is None) != (table is None):
        raise ValueError("table and model_output: one is given without the other, expected both or none")
    for name, given in (("uncond_output", uncond_output), ("output_scale", output_scale)):
        if given is not None and model_output is None:
            raise ValueError(f"{name} is given without model_output, expected both")
    quantile, maximum = checks.real("quantile", quantile), checks.real("maximum", maximum)
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}, expected 0 < quantile <= 1")
    if not maximum >= 1:
        raise ValueError(f"maximum is {maximum}, expected at least 1")
    dtype = checks.compute_dtype(x_t.dtype)
    x0 = x_t.to(dtype)
    if model_output is not None and table is not None:
        check_samples("x_t", x_t, table, t, {})
        checks.like("model_output", model_output, "x_t", x_t, lower=True)
        if uncond_output is not None:
            checks.like("uncond_output", uncond_output, "model_output", model_output)
        check_scale("output_scale", output_scale, x_t)
        row = row_numbers(table, t, x_t, dtype)
        x0 = affine(row.a, x0, row.b, guided_output(x_t, model_output, uncond_output, output_scale, row.w))
    if x_t.numel() == 0 and len(x_t) > 0:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected no empty samples")
    if len(x_t) == 0:
        return x0.new_empty(0)
    # This is the value of torch.quantile, which would sort all elements and accepts at most 2^24 elements.
    sizes = x0.reshape(len(x_t), -1).abs()
    position = quantile * (sizes.shape[1] - 1)
    low = math.floor(position)
    largest = sizes.topk(sizes.shape[1] - low, dim=1).values  # NaN is the largest
    below = largest[:, -1]
    above = largest[:, -2] if position > low else below
    bound = torch.lerp(below, above, position - low).clamp(1, maximum)
    return torch.where(largest[:, 0].isnan(), largest[:, 0], bound).reciprocal()


def output_scale(model_output: Tensor, uncond_output: Tensor, *, guidance: float, rescale: float) -> Tensor:
    """Twin of ops.output_scale, in plain torch. The result is float64 if the model's outputs are."""
    checks.samples("model_output", model_output)
    checks.like("uncond_output", uncond_output, "model_output", model_output)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}, expected a finite number")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}, expected 0 <= rescale <= 1")
    dtype = checks.compute_dtype(model_output.dtype)
    batch = len(model_output)
    if batch == 0:
        return model_output.new_empty(0, dtype=dtype)
    m, u = (output.to(dtype).reshape(batch, -1) for output in (model_output, uncond_output))
    if m.shape[1] < 2:
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}, expected samples of two elements or more"
        )
    ratio = _spread(m) / _spread(torch.lerp(u, m, guidance))
    return 1 + rescale * (ratio - 1)


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each row, times a factor that depends only on the row's length.

    On a CPU, torch.std takes ten times as long.
    """
    return torch.linalg.vector_norm(x - x.mean(1, keepdim=True), dim=1)
