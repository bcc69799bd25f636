"""reverse_step and step_with_options in plain torch. reference.py imports them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops.noise import STREAM_REVERSE, Philox
from ddpm_ext.ops.reference_inputs import affine, check_noise, check_samples, check_scale, finish, resolve_noise
from ddpm_ext.ops.row import row_numbers
from ddpm_ext.ops.step_inputs import STEP_INPUTS, InputKind, names


def check_plain_step(
    x_t: Tensor,
    table: Tensor,
    t: int | Tensor,
    noise: Tensor | None,
    rng: Philox | None,
    out: Tensor | None,
    add_noise: bool = True,
) -> None:
    """Checks the arguments of reverse_step that are known before a model is called."""
    check_samples("x_t", x_t, table, t, {"noise": noise, "out": out})
    check_noise(x_t, noise, rng, add_noise)


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    clip: Clip | None = (-1.0, 1.0),
    noise: Tensor | None = None,
    rng: Philox | None = None,
    add_noise: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Twin of ops.reverse_step."""
    checks.clip_range(clip)
    check_plain_step(x_t, table, t, noise, rng, out, add_noise)
    checks.like("model_output", model_output, "x_t", x_t, lower=True)
    dtype = checks.compute_dtype(x_t.dtype)
    row = row_numbers(table, t, x_t, dtype)
    x, m = x_t.to(dtype), model_output.to(dtype)
    x_start = affine(row.a, x, row.b, m)
    if clip is not None:
        x_start = x_start.clamp(*clip)
    # If c2 is 0, m is not multiplied, since 0 times an infinite m would be NaN although the clip made x_start finite.
    # The terms are added in the order of step_with_options, so that the results of both have the same bits.
    prev = row.c0 * x_start + (row.c1 * x + torch.where(row.c2 == 0, 0.0, row.c2 * m))
    if add_noise or noise is not None or rng is not None:
        prev = prev + row.s * resolve_noise(x_t, noise, rng, STREAM_REVERSE, row.draw)
    return finish(prev, x_t, out)


def _check_inputs(x_t: Tensor, model_output: Tensor | None, inputs: Mapping[str, Tensor | None]) -> None:
    """Checks the arguments of step_with_options that reverse_step does not have."""
    for name in names(InputKind.LIKE_X, InputKind.RESULT):
        tensor = inputs[name]
        if tensor is not None:
            checks.like(name, tensor, "x_t", x_t)
    model_input = inputs["model_input"]
    if model_input is not None:
        checks.floating("model_input", model_input)
        if model_input.dtype == torch.float64 != x_t.dtype:
            raise TypeError("model_input has dtype torch.float64, expected float32, float16 or bfloat16")
        twice = x_t.expand(2, *x_t.shape).flatten(0, 1) if len(model_input) == 2 * len(x_t) else x_t
        checks.like("model_input", model_input, "x_t", twice.to(model_input.dtype))
    of_model = {"model_output": model_output} | {name: inputs[name] for name in names(InputKind.OF_MODEL)}
    first, *others = [(name, tensor) for name, tensor in of_model.items() if tensor is not None] or [("x_t", x_t)]
    checks.like(*first, "x_t", x_t, lower=True)
    for name, tensor in others:
        checks.like(name, tensor, *first)
    for name in names(InputKind.PER_SAMPLE):
        check_scale(name, inputs[name], x_t)
    if inputs["uncond_output"] is not None and model_output is None:
        raise ValueError("uncond_output is given without model_output, expected both")
    for one, other in (("mask", "known"), ("known", "mask")):
        if inputs[one] is not None and inputs[other] is None:
            raise ValueError(f"{one} is given without {other}, expected both")


def _factor(value: Tensor | None, x_t: Tensor) -> Tensor | float:
    """A factor of each sample, (batch,), in the shape (batch, 1, ...); 1.0 for None."""
    if value is None:
        return 1.0
    return value.to(checks.compute_dtype(x_t.dtype)).reshape(-1, *[1] * (x_t.dim() - 1))


def guided_output(
    x_t: Tensor, model_output: Tensor | None, uncond_output: Tensor | None, output_scale: Tensor | None, w: Tensor
) -> Tensor:
    """output_scale (u + w (m - u)), with m = model_output and u = uncond_output. A missing m counts as 0."""
    dtype = checks.compute_dtype(x_t.dtype)
    m = torch.zeros((), dtype=dtype, device=x_t.device) if model_output is None else model_output.to(dtype)
    if uncond_output is not None:
        u = uncond_output.to(dtype)
        m = torch.where(w == 1, m, u + w * (m - u))
    return m * _factor(output_scale, x_t)


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
    """Twin of ops.step_with_options, whose docstring has the equations."""
    inputs = {name: value for name, value in locals().items() if name in STEP_INPUTS and name != "log_variance"}
    checks.clip_range(clip)
    checks.flag("log_variance", log_variance)
    check_plain_step(x_t, table, t, noise, rng, out, add_noise)
    _check_inputs(x_t, model_output, inputs)
    dtype = checks.compute_dtype(x_t.dtype)
    row = row_numbers(table, t, x_t, dtype)
    x, zero = x_t.to(dtype), torch.zeros((), dtype=dtype, device=x_t.device)

    def term(factor: Tensor, tensor: Tensor | None) -> Tensor:
        """factor times tensor. A factor of 0 gives 0, also if the tensor is infinite or was never written."""
        return zero if tensor is None else torch.where(factor == 0, zero, factor * tensor.to(dtype))

    m = guided_output(x_t, model_output, uncond_output, output_scale, row.w)
    x0 = (affine(row.a, x, row.b, m) if x_start is None else x_start.to(dtype)) * _factor(x_start_scale, x_t)
    if clip is not None:
        x0 = x0.clamp(*clip)
    deviation = torch.ones_like(x)
    if model_variance is not None:
        v = model_variance.to(dtype)
        log = row.l0 + row.l1 * v
        deviation = log.clamp(-87, 88).exp() if log_variance else v.clamp(2.0**-100, 2.0**100).sqrt()
    other_terms = row.c1 * x + term(row.c2, m) + term(row.cu, uncond_output)
    other_terms = other_terms + term(row.h1, history1) + term(row.h2, history2) + term(row.h3, history3)
    if gradient is not None:
        g = gradient.to(dtype)
        x0 = x0 + row.g0 * g
        other_terms = other_terms + deviation**2 * row.g1 * g
    prev = row.c0 * x0 + other_terms
    z = zero
    if add_noise or noise is not None or rng is not None:
        z = resolve_noise(x_t, noise, rng, STREAM_REVERSE, row.draw)
        # As in the plain step, noise of the caller is multiplied by s even if s is 0, so infinite noise gives NaN.
        prev = prev + z * (row.s * deviation if noise is not None else term(row.s, deviation))
    if mask is not None and known is not None:
        share = mask.to(dtype)
        prev = share * (row.signal_after * known.to(dtype) + row.noise_after * z) + (1 - share) * prev
    history = term(row.k0, x0) + term(row.k1, x) + term(row.k2, m)
    for result, value in ((history_out, history), (x0_out, x0)):
        if result is not None:
            result.copy_(value)
    if model_input is not None and len(x):
        for half in model_input.split(len(x)):
            half.copy_(row.c_in * prev)
    return finish(prev, x_t, out)
