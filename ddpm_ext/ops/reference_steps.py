"""The steps in plain torch: see reference.py, from which they are imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops.extended_inputs import EXTENDED_INPUTS
from ddpm_ext.ops.input_kinds import Kind, names
from ddpm_ext.ops.linear_inputs import LINEAR_INPUTS
from ddpm_ext.ops.noise import STREAM_REVERSE, Philox
from ddpm_ext.ops.reference_inputs import (
    check_noise,
    check_samples,
    check_scale,
    columns,
    draws_of_rows,
    finish,
    resolve_noise,
)

__all__ = ["ReverseStep", "check_reverse_step", "extended_step", "linear_step", "reverse_step"]


def check_reverse_step(
    x_t: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    out: Tensor | None = None,
) -> None:
    """Twin of ops.check_reverse_step."""
    check_samples("x_t", x_t, table, t, {"noise": noise, "out": out})
    check_noise(x_t, noise, rng)


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
    check_reverse_step(x_t, table, t, noise=noise, rng=rng, out=out)
    checks.like("model_output", model_output, "x_t", x_t, lower=True)
    dtype = checks.compute_dtype(x_t.dtype)
    a, b, c0, c1, c2, s, *_ = columns(table.to(dtype), t, x_t)
    x, m = x_t.to(dtype), model_output.to(dtype)
    x_start = a * x + b * m
    if clip is not None:
        x_start = x_start.clamp(*clip)
    # Where c2 is 0, an infinite m must not make a NaN of a result that the clip keeps finite.
    prev = c0 * x_start + c1 * x + torch.where(c2 == 0, 0.0, c2 * m)
    if add_noise or noise is not None or rng is not None:
        prev = prev + s * resolve_noise(x_t, noise, rng, STREAM_REVERSE, draws_of_rows(table, t, x_t))
    return finish(prev, x_t, out)


class ReverseStep:
    """Twin of ops.fused.ReverseStep."""

    run = None

    def __init__(
        self,
        table: Tensor,
        *,
        clip: Clip | None = (-1.0, 1.0),
        noise: Tensor | None = None,
        rng: Philox | None = None,
        add_noise: bool = True,
        timesteps: object = None,
        unwrap: object = None,
    ) -> None:
        checks.tensor("table", table)
        self._table, self._noise, self._rng = table, noise, rng
        self._given: dict[str, Any] = {"clip": clip, "noise": noise, "rng": rng, "add_noise": add_noise}

    def check(self, x_t: Tensor, row: Tensor | None, index: int, out: Tensor | None = None) -> None:
        t = index if row is None else row
        check_reverse_step(x_t, self._table, t, noise=self._noise, rng=self._rng, out=out)

    def take(
        self, x_t: Tensor, model_output: Tensor, row: Tensor | None, index: int, out: Tensor | None = None
    ) -> Tensor:
        t = index if row is None else row
        return reverse_step(x_t, model_output, self._table, t, **self._given, out=out)


def _check_step(
    x_t: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    t: int | Tensor,
    noise: Tensor | None,
    rng: Philox | None,
    out: Tensor | None,
    inputs: Mapping[str, Tensor | None],
    kinds: Mapping[str, Kind],
) -> None:
    """Checks the arguments of a step with optional inputs, of which `kinds` says what each must be like."""
    like_x = {"noise": noise, "out": out} | {name: inputs[name] for name in names(kinds, Kind.LIKE_X, Kind.RESULT)}
    check_samples("x_t", x_t, table, t, like_x)
    check_noise(x_t, noise, rng)
    of_model = {"model_output": model_output} | {name: inputs[name] for name in names(kinds, Kind.OF_MODEL)}
    first, *others = [(name, given) for name, given in of_model.items() if given is not None] or [("x_t", x_t)]
    checks.like(*first, "x_t", x_t, lower=True)
    for name, given in others:
        checks.like(name, given, *first)
    for name in names(kinds, Kind.PER_SAMPLE):
        check_scale(name, inputs[name], x_t)
    if inputs["uncond_output"] is not None and model_output is None:
        raise ValueError("uncond_output is given without model_output, expected both")


def _factor(given: Tensor | None, x_t: Tensor) -> Tensor | float:
    """One number for each sample, (batch, 1, ...)."""
    if given is None:
        return 1.0
    return given.to(checks.compute_dtype(x_t.dtype)).reshape(-1, *[1] * (x_t.dim() - 1))


def guided_output(
    x_t: Tensor,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    output_scale: Tensor | None,
    w: Tensor,
) -> Tensor:
    """output_scale (u + w (m - u))."""
    dtype = checks.compute_dtype(x_t.dtype)
    m = torch.zeros((), dtype=dtype, device=x_t.device) if model_output is None else model_output.to(dtype)
    if uncond_output is not None:
        u = uncond_output.to(dtype)
        m = torch.where(w == 1, m, u + w * (m - u))
    return m * _factor(output_scale, x_t)


def _predicted_start(x_t: Tensor, x_start: Tensor, x_start_scale: Tensor | None, clip: Clip | None) -> Tensor:
    """clip(x_start_scale x_start)."""
    x0 = x_start.to(checks.compute_dtype(x_t.dtype)) * _factor(x_start_scale, x_t)
    return x0 if clip is None else x0.clamp(*clip)


def extended_step(
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
    history: Tensor | None = None,
    gradient: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    out_copy: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> Tensor:
    """Twin of ops.extended_step, whose docstring has the equations."""
    inputs = {
        "uncond_output": uncond_output,
        "output_scale": output_scale,
        "model_variance": model_variance,
        "x_start": x_start,
        "x_start_scale": x_start_scale,
        "history": history,
        "gradient": gradient,
        "known": known,
        "mask": mask,
        "out_copy": out_copy,
        "x0_out": x0_out,
    }
    checks.clip_range(clip)
    _check_step(x_t, model_output, table, t, noise, rng, out, inputs, EXTENDED_INPUTS)
    if mask is not None and known is None:
        raise ValueError("mask is given without known, expected both")
    if known is not None and mask is None:
        raise ValueError("known is given without mask, expected both")
    dtype = checks.compute_dtype(x_t.dtype)
    a, b, c0, c1, c2, s, _, c3, l0, l1, g0, g1, k0, k1, w, _ = columns(table.to(dtype), t, x_t)
    x, zero = x_t.to(dtype), torch.zeros((), dtype=dtype, device=x_t.device)
    m = guided_output(x_t, model_output, uncond_output, output_scale, w)
    x0 = _predicted_start(x_t, a * x + b * m if x_start is None else x_start, x_start_scale, clip)
    # Where a factor is 0, its tensor may be infinite, or memory that was never written.
    rest = c1 * x + torch.where(c2 == 0, zero, c2 * m)
    if history is not None:
        rest = rest + torch.where(c3 == 0, zero, c3 * history.to(dtype))
    deviation = torch.ones_like(x)
    if model_variance is not None:
        v = model_variance.to(dtype)
        deviation = (l0 + l1 * v).clamp(-87, 88).exp() if log_variance else v.clamp(2.0**-100, 2.0**100).sqrt()
    if gradient is not None:
        g = gradient.to(dtype)
        x0 = x0 + g0 * g
        rest = rest + deviation**2 * g1 * g
    prev = c0 * x0 + rest
    z = zero
    if add_noise or noise is not None or rng is not None:
        z = resolve_noise(x_t, noise, rng, STREAM_REVERSE, draws_of_rows(table, t, x_t))
        # As in the plain step, given noise counts in every row.
        prev = prev + z * (s * deviation if noise is not None else torch.where(s == 0, zero, s * deviation))
    if mask is not None and known is not None:
        share = mask.to(dtype)
        prev = share * (k0 * known.to(dtype) + k1 * z) + (1 - share) * prev
    if x0_out is not None:
        x0_out.copy_(x0)
    if out_copy is not None:
        out_copy.copy_(prev)
    return finish(prev, x_t, out)


def linear_step(
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
    x_start: Tensor | None = None,
    x_start_scale: Tensor | None = None,
    history1: Tensor | None = None,
    history2: Tensor | None = None,
    history3: Tensor | None = None,
    out: Tensor | None = None,
    out_copy: Tensor | None = None,
    x0_out: Tensor | None = None,
    history_out: Tensor | None = None,
) -> Tensor:
    """Twin of ops.linear_step, whose docstring has the equations."""
    inputs = {
        "uncond_output": uncond_output,
        "output_scale": output_scale,
        "x_start": x_start,
        "x_start_scale": x_start_scale,
        "history1": history1,
        "history2": history2,
        "history3": history3,
        "out_copy": out_copy,
        "x0_out": x0_out,
        "history_out": history_out,
    }
    checks.clip_range(clip)
    _check_step(x_t, model_output, table, t, noise, rng, out, inputs, LINEAR_INPUTS)
    dtype = checks.compute_dtype(x_t.dtype)
    a, b, c0, c1, c2, s, _, cu, h1, h2, h3, k0, k1, k2, w, _ = columns(table.to(dtype), t, x_t)
    x, zero = x_t.to(dtype), torch.zeros((), dtype=dtype, device=x_t.device)

    def term(factor: Tensor, given: Tensor | None) -> Tensor:
        """Where the factor is 0, the tensor may be infinite, or memory that was never written."""
        return zero if given is None else torch.where(factor == 0, zero, factor * given.to(dtype))

    m = guided_output(x_t, model_output, uncond_output, output_scale, w)
    x0 = _predicted_start(x_t, a * x + b * m if x_start is None else x_start, x_start_scale, clip)
    rest = c1 * x + term(c2, m) + term(cu, uncond_output)
    rest = rest + term(h1, history1) + term(h2, history2) + term(h3, history3)
    prev = c0 * x0 + rest
    if add_noise or noise is not None or rng is not None:
        z = resolve_noise(x_t, noise, rng, STREAM_REVERSE, draws_of_rows(table, t, x_t))
        # As in the plain step, given noise counts in every row.
        prev = prev + (s * z if noise is not None else term(s, z))
    kept = term(k0, x0) + term(k1, x) + term(k2, m)
    if history_out is not None:
        history_out.copy_(kept)
    if x0_out is not None:
        x0_out.copy_(x0)
    if out_copy is not None:
        out_copy.copy_(prev)
    return finish(prev, x_t, out)
