"""The operators in Python: one launch each, on the CPU or a GPU. `reference` has a twin of each, by the same name.

Eager calls go through pybind11 (which hands over to torch's dispatcher where gradients, subclasses or modes are at
work), compiled ones through torch.ops.ddpm_ext.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_ext import checks
from ddpm_ext._extension import C
from ddpm_ext.checks import split_t
from ddpm_ext.noise import STREAM_FORWARD, STREAM_REVERSE, Philox, check_rng, fresh_arguments, randn

__all__ = [
    "check_reverse_step",
    "forward_process",
    "mse_loss",
    "posterior_mean",
    "predict_start",
    "randn",
    "reverse_step",
]

Clip = tuple[float, float]
NO_CLIP = (-math.inf, math.inf)
_NO_RNG = (None, 0, None, 0, 0, -1)


def _noise_arguments(noise: Tensor | None, rng: Philox | None, drawn: bool, stream: int) -> tuple[Any, ...]:
    """noise, draw_noise and the rng's arguments."""
    if rng is not None:
        check_rng(rng)
        if noise is not None:
            raise ValueError("noise and rng are both given, expected one of them")
        return None, True, *rng.arguments(stream)
    if noise is not None:
        checks.tensor("noise", noise)
        return noise, False, *_NO_RNG
    if drawn:
        return None, True, *fresh_arguments(stream)
    return None, False, *_NO_RNG


def _refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """As C does for an eager call."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, but out= records no gradients, expected none")


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
    """One step of the reverse process by row t of a step table: see `tables`.

    Args:
        x_t: (batch, ...), float32, float16 or bfloat16.
        model_output: as x_t; of a lower precision, too.
        table: float32 (rows, 8): StepTable.packed.
        t: row of each sample, int64 (batch,), or one int for all, in [0, rows). On a GPU its values are not read back
            to be checked: the kernel takes the nearest row.
        clip: range of the predicted clean sample, None for no clip.
        noise: as x_t: used in place of drawn noise.
        rng: whose noise to draw (stream 0, the row's draw); None: a seed from torch's default CPU generator.
        add_noise: False gives the mean.
        out: as x_t: where the result goes; x_t itself is fine. No gradients then.

    Returns:
        x_{t-1}, as x_t. Differentiable in x_t, model_output and noise.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device, or out of range.
    """
    checks.tensor("x_t", x_t)
    checks.tensor("model_output", model_output)
    if out is not None:
        checks.tensor("out", out)
    row, index = split_t(t)
    low, high = NO_CLIP if clip is None else clip
    arguments = (row, index, low, high, *_noise_arguments(noise, rng, add_noise, STREAM_REVERSE))
    if not torch.compiler.is_compiling():
        return C.reverse_step(x_t, model_output, table, *arguments, out)
    if out is None:
        return torch.ops.ddpm_ext.reverse_step(x_t, model_output, table, *arguments)
    _refuse_grad("reverse_step", x_t=x_t, model_output=model_output, noise=noise, out=out)
    torch.ops.ddpm_ext.reverse_step.out(x_t, model_output, table, *arguments, out=out)
    return out


def check_reverse_step(
    x_t: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    out: Tensor | None = None,
) -> None:
    """What reverse_step would say of these, before a model is called with them."""
    checks.tensor("x_t", x_t)
    if out is not None:
        checks.tensor("out", out)
    row, index = split_t(t)
    arguments = _noise_arguments(noise, rng, False, STREAM_REVERSE)
    if not torch.compiler.is_compiling():
        C.check_reverse_step(x_t, table, row, index, *arguments, out)


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
    """k0 x_start + k1 z by row t of a table (rows, 2): x_t, or whatever else is affine in x_start and its noise.

    Args:
        x_start: (batch, ...), float32, float16 or bfloat16.
        table: float32 (rows, 2).
        t: row of each sample, int64 (batch,), or one int for all, in [0, rows).
        noise: as x_start: used in place of drawn noise.
        rng: whose noise to draw (stream 2, draw t); None: a seed from torch's default CPU generator.
        add_noise: False gives k0 x_start.
        out: as x_start: where the result goes; x_start itself is fine. No gradients then.

    Returns:
        as x_start. Differentiable in x_start and noise.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device, or out of range.
    """
    checks.tensor("x_start", x_start)
    if out is not None:
        checks.tensor("out", out)
    row, index = split_t(t)
    arguments = (row, index, *_noise_arguments(noise, rng, add_noise, STREAM_FORWARD))
    if not torch.compiler.is_compiling():
        return C.forward_process(x_start, table, *arguments, out)
    if out is None:
        return torch.ops.ddpm_ext.forward_process(x_start, table, *arguments)
    _refuse_grad("forward_process", x_start=x_start, noise=noise, out=out)
    torch.ops.ddpm_ext.forward_process.out(x_start, table, *arguments, out=out)
    return out


def predict_start(x_t: Tensor, noise: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_t + k1 noise by row t of a table (rows, 2): the clean sample of which x_t is made with this noise.

    Args, raises: as reverse_step, noise as its model_output. Differentiable in x_t and noise.
    """
    checks.tensor("x_t", x_t)
    checks.tensor("noise", noise)
    row, index = split_t(t)
    if torch.compiler.is_compiling():
        return torch.ops.ddpm_ext.predict_start(x_t, noise, table, row, index)
    return C.predict_start(x_t, noise, table, row, index)


def posterior_mean(x_start: Tensor, x_t: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_start + k1 x_t by row t of a table (rows, 2): the mean of q(x_{t-1} | x_t, x_0).

    Args, raises: as reverse_step. Differentiable in x_start and x_t.
    """
    checks.tensor("x_start", x_start)
    checks.tensor("x_t", x_t)
    row, index = split_t(t)
    if torch.compiler.is_compiling():
        return torch.ops.ddpm_ext.posterior_mean(x_start, x_t, table, row, index)
    return C.posterior_mean(x_start, x_t, table, row, index)


def mse_loss(model_output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, a scalar: torch's, with the same bits where it is compiled."""
    if torch.compiler.is_compiling():
        return torch.ops.ddpm_ext.mse_loss(model_output, target)
    return F.mse_loss(model_output, target)


# ------------------------------------------------------------------------------------------ shapes without data

_lib = torch.library


@_lib.register_fake("ddpm_ext::reverse_step")
def _(x_t: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x_t)


@_lib.register_fake("ddpm_ext::forward_process")
def _(x_start: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x_start)


@_lib.register_fake("ddpm_ext::predict_start")
def _(x_t: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_t)


@_lib.register_fake("ddpm_ext::posterior_mean")
def _(x_start: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_start)


@_lib.register_fake("ddpm_ext::reverse_step.out")
def _(*_: Any, out: Tensor) -> None: ...


@_lib.register_fake("ddpm_ext::forward_process.out")
def _(*_: Any, out: Tensor) -> None: ...


@_lib.register_fake("ddpm_ext::randn")
def _(size: list[int], *_: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


@_lib.register_fake("ddpm_ext::mse_loss")
def _(model_output: Tensor, target: Tensor) -> Tensor:
    return model_output.new_empty(())


@_lib.register_fake("ddpm_ext::draw_seed")
def _() -> Tensor:
    return torch.empty((), dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------- gradients


def _affine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, y, table, t, ctx.index = inputs
    ctx.save_for_backward(table, t)
    ctx.y_dtype = y.dtype


def _scale(grad: Tensor, table: Tensor, t: Tensor | None, index: int) -> Tensor:
    return torch.ops.ddpm_ext.forward_process(grad, table, t, index, None, False)


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, t = ctx.saved_tensors
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = _scale(grad, table, t, ctx.index)
    if ctx.needs_input_grad[1]:
        grad_y = _scale(grad, table.flip(1), t, ctx.index).to(ctx.y_dtype)
    return grad_x, grad_y, None, None, None


for _name in ("predict_start", "posterior_mean"):
    _lib.register_autograd(f"ddpm_ext::{_name}", _affine_backward, setup_context=_affine_setup)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.index, ctx.inputs = inputs[3], len(inputs)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, t = ctx.saved_tensors
    grads: list[Any] = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        grads[0] = _scale(grad, table, t, ctx.index)
    if ctx.needs_input_grad[4]:
        grads[4] = _scale(grad, table.flip(1), t, ctx.index)
    return tuple(grads)


_lib.register_autograd("ddpm_ext::forward_process", _forward_backward, setup_context=_forward_setup)


def _clamp_lets_edges_through() -> bool:
    """Whether torch.clamp's gradient at the very edge is 1, as in older versions, or 0, as in newer ones."""
    with torch.inference_mode(False), torch.enable_grad():
        edge = torch.ones((), requires_grad=True)
        return bool(torch.autograd.grad(edge.clamp(-1, 1), edge)[0])


_EDGES_INSIDE = _clamp_lets_edges_through()


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_t, model_output, table, t, ctx.index, ctx.clip_min, ctx.clip_max, *_ = inputs
    ctx.save_for_backward(x_t, model_output, table, t)
    ctx.inputs = len(inputs)


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_t, model_output, table, t = ctx.saved_tensors
    rows = table[t] if t is not None else table[ctx.index].expand(len(x_t), -1)
    a, b, c0, c1, c2, s = rows[:, :6].reshape(len(x_t), 6, *[1] * (x_t.dim() - 1)).unbind(1)
    clipped = c0 * grad
    if (ctx.clip_min, ctx.clip_max) != NO_CLIP:
        # The same operation as in the step, so that the clip holds back exactly what it clipped.
        x_start = torch.ops.ddpm_ext.predict_start(x_t.float(), model_output, table[:, :2].contiguous(), t, ctx.index)
        inside = (x_start > ctx.clip_min) & (x_start < ctx.clip_max)
        if _EDGES_INSIDE:
            inside = (x_start >= ctx.clip_min) & (x_start <= ctx.clip_max)
        clipped = torch.where(inside, clipped, 0.0)
    grads: list[Any] = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        grads[0] = (a * clipped + c1 * grad).to(x_t.dtype)
    if ctx.needs_input_grad[1]:
        grads[1] = (b * clipped + c2 * grad).to(model_output.dtype)
    if ctx.needs_input_grad[7]:
        grads[7] = (s * grad).to(x_t.dtype)
    return tuple(grads)


_lib.register_autograd("ddpm_ext::reverse_step", _step_backward, setup_context=_step_setup)


def _mse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    model_output, target = ctx.saved_tensors
    grad_output = (model_output - target) * (grad * (2 / max(model_output.numel(), 1)))
    return grad_output, -grad_output


_lib.register_autograd("ddpm_ext::mse_loss", _mse_backward, setup_context=_mse_setup)
