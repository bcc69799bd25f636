"""Factors of a step that are statistics of each sample: each operator computes one factor in one launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.checks import split_t
from ddpm_ext.ops import reference_scales
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.torch_library import is_traced


def _need_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    """1 / bound of each sample: a step's x_start_scale for dynamic thresholding (Saharia et al. 2022, section 2.3).

    The bound is the quantile of |x0|, interpolated as in torch.quantile, but at least 1 and at most `maximum`. x0 is
    the predicted clean sample of a step with these arguments, in float32, before the step scales and clips it. The
    operator does not store x0. For a sample with a NaN, the result is NaN. A sample's result has the same bits in every
    batch and on every device.

    Args:
        x_t: (batch, ...), float32, float16 or bfloat16, at least one element a sample.
        model_output: like x_t, or of a lower precision. With None, x_t itself is x0.
        table: StepTable.packed, float32 (rows, 24), or None without model_output.
        t: row of each sample, int64 (batch,), or one int for all, in [0, rows).
        quantile: in (0, 1].
        maximum: the largest bound, at least 1.
        uncond_output, output_scale: see step_with_options.

    Returns:
        float32 (batch,). If an argument requires a gradient, torch's own operators compute it, differentiably.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.

    Examples:
        >>> x_start_scale(2 * x_t, quantile=0.995).shape
        torch.Size([4])
    """
    checks.tensor("x_t", x_t)
    options = {"uncond_output": uncond_output, "output_scale": output_scale}
    checks.tensors(model_output=model_output, table=table, **options)
    if _need_grad(x_t, model_output, uncond_output, output_scale):
        return reference_scales.x_start_scale(
            x_t, model_output, table, t, quantile=quantile, maximum=maximum, **options
        )
    row, index = split_t(t)
    quantile, maximum = checks.real("quantile", quantile), checks.real("maximum", maximum)
    call = torch.ops.ddpm_ext.x_start_scale if is_traced() else C.x_start_scale
    return call(x_t, model_output, table, row, index, quantile, maximum, uncond_output, output_scale)


def output_scale(model_output: Tensor, uncond_output: Tensor, *, guidance: float, rescale: float) -> Tensor:
    """1 + rescale (std(m) / std(u + guidance (m - u)) - 1) of each sample: a step's output_scale for rescaled guidance.

    See Lin et al. 2024, section 3.4. Sums have one fixed order, so that their bits are the same in every batch, with
    every number of threads, on the CPU and on a GPU.

    Args:
        model_output: m, (batch, ...), float32, float16 or bfloat16, at least two elements a sample.
        uncond_output: u, like model_output.
        guidance: the scale of classifier-free guidance.
        rescale: phi of the paper, in [0, 1].

    Returns:
        float32 (batch,). If an argument requires a gradient, torch's own operators compute it, differentiably.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.

    Examples:
        >>> output_scale(x_t, 0.9 * x_t, guidance=3.0, rescale=0.7).shape
        torch.Size([4])
    """
    checks.tensor("model_output", model_output)
    checks.tensor("uncond_output", uncond_output)
    if _need_grad(model_output, uncond_output):
        return reference_scales.output_scale(model_output, uncond_output, guidance=guidance, rescale=rescale)
    call = torch.ops.ddpm_ext.output_scale if is_traced() else C.output_scale
    return call(model_output, uncond_output, guidance, rescale)
