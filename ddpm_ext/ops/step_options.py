"""The step with optional tensors. step_inputs.py lists them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.checks import split_t
from ddpm_ext.base.types import Clip
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.noise import STREAM_REVERSE, Philox, noise_arguments
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.ops.torch_library import NO_CLIP, is_traced


def refuse_grad(op: str, recorder: str = "out=", **tensors: Tensor | None) -> None:
    """Raises ValueError if a tensor requires a gradient, in calls under torch.compile or torch.jit.trace.

    In eager calls, the compiled operators make this check.

    Args:
        op: the operator's name.
        recorder: the subject of "records no gradients" in the error's text.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, but {recorder} records no gradients, expected none")


def step_with_options(
    x_t: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    t: int | Tensor,
    *,
    clip: Clip | None = (-1.0, 1.0),
    noise: Tensor | None = None,
    rng: Philox | None = None,
    add_noise: bool = True,
    uncond_output: Tensor | None = None,
    output_scale: Tensor | None = None,
    model_variance: Tensor | None = None,
    log_variance: bool = True,
    x_start: Tensor | None = None,
    x_start_scale: Tensor | None = None,
    history1: Tensor | None = None,
    history2: Tensor | None = None,
    history3: Tensor | None = None,
    gradient: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    model_input: Tensor | None = None,
    x0_out: Tensor | None = None,
    history_out: Tensor | None = None,
) -> Tensor:
    """reverse_step with all options of a loop and the history of multistep samplers, in one launch.

    The row's equation is in ddpm_ext.tables.step_table; its u, v, g and H1 are uncond_output, model_variance, gradient
    and history1. Three more equations apply before the row's equation, within it and after it. There w is the row's
    scale of guidance, p is x_start or, without x_start, the row's a x + b m, and signal_after and noise_after are the
    levels of signal and noise at the end of the step:

        m    = output_scale (u + w (m - u))                               before the row
        x0   = clip(x_start_scale p) + g0 g                               in place of the row's x0
        prev = mask (signal_after known + noise_after z) + (1 - mask) prev     after the row

    The term of a missing input is left out. So is a term whose factor c2, cu, h1 to h3 or k0 to k2 is 0 in the row,
    even if its tensor is infinite. If w is 1, m does not depend on u. A call with none of these inputs is the plain
    step. The row decides what the history is: with k0 = 1 it is the predicted clean sample, with k2 = 1 the model's
    output, and so on.

    Args:
        x_t: (batch, ...), float32, float16 or bfloat16.
        model_output: like x_t, or of a lower precision. None counts as 0, for rows that don't need it or with x_start.
        table: StepTable.packed, float32 (rows, 24).
        t, noise, rng, add_noise: see reverse_step.
        clip: range (low, high) that the predicted clean sample is clipped to, or None.
        uncond_output: u of classifier-free guidance (Ho & Salimans 2022, eq. 6, of scale w - 1), like model_output.
        output_scale: float32 (batch,), a factor of the guided output (Lin et al. 2024, section 3.4).
        model_variance: v, the model's output for its variance, like model_output.
        log_variance: whether l0 + l1 v is the logarithm of the standard deviation, clamped to [-87, 88]. Otherwise v is
            the variance itself, clamped to [2^-100, 2^100].
        x_start: the predicted clean sample before scale and clip, like x_t. It replaces a x + b m.
        x_start_scale: float32 (batch,), a factor of the prediction before it is clipped. For dynamic thresholding it is
            1 / bound (Saharia et al. 2022, section 2.3).
        history1, history2, history3: the history_out of earlier steps, the latest first, like x_t.
        gradient: the gradient of a classifier's log-probability (Dhariwal & Nichol 2021), like x_t.
        known, mask: a clean sample, and its share of the result, from 0 to 1, both like x_t. z is the step's noise.
        out: a tensor like x_t for the result.
        model_input: receives the model's next input, c_in prev. It has x_t's shape or twice its batch, and any of the
            three dtypes. With twice the batch, both halves receive the input.
        x0_out: receives the predicted clean sample, with the gradient's term, like x_t.
        history_out: receives the tensor that the row keeps, k0 x0 + k1 x + k2 m, like x_t.

    out, x0_out, history_out and a model_input like x_t may have the memory of an input, if each element has the same
    address in both: history_out may be history3.

    Returns:
        x_{t-1}, like x_t. Gradients are not recorded.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, is out of range, or requires a
            gradient; mask is given without known, known without mask, or uncond_output without model_output.

    Examples:
        >>> table = gd.table("steps", "x_t", x_t)
        >>> half = (torch.arange(8) < 4).float().expand_as(x_t)  # known where it is 1
        >>> x_before = step_with_options(x_t, model(x_t, 999), table, 999, rng=Philox(0), known=images, mask=half)
    """
    inputs: dict[str, Any] = {
        "uncond_output": uncond_output,
        "output_scale": output_scale,
        "model_variance": model_variance,
        "log_variance": log_variance,
        "x_start": x_start,
        "x_start_scale": x_start_scale,
        "history1": history1,
        "history2": history2,
        "history3": history3,
        "gradient": gradient,
        "known": known,
        "mask": mask,
        "model_input": model_input,
        "x0_out": x0_out,
        "history_out": history_out,
    }
    tensors = {name: value for name, value in inputs.items() if name != "log_variance"}
    tensors.update(model_output=model_output, out=out)  # not |=, which torch.compile of torch 2.7 does not take
    checks.tensor("x_t", x_t)
    checks.tensors(**tensors)
    checks.tensor("table", table)
    checks.flag("log_variance", log_variance)
    row, index = split_t(t)
    low, high = checks.clip_range(clip) or NO_CLIP
    arguments = (row, index, low, high, *noise_arguments(noise, rng, add_noise, STREAM_REVERSE, x_t.device))
    if out is None:
        out = empty_like(x_t)
    if not is_traced():
        C.step_with_options(x_t, model_output, table, *arguments, out, *inputs.values(), None)
        return out
    refuse_grad("step_with_options", "it", x_t=x_t, noise=noise, **tensors)
    torch.ops.ddpm_ext.step_with_options(x_t, model_output, table, *arguments, out=out, **inputs)
    return out
