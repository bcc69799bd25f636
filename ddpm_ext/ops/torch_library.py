"""Registers the operators' gradients, and fake implementations, from which torch knows the shapes of the results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.torch_version import TORCH
from ddpm_ext.ops import extension as _extension  # noqa: F401  registers the operators
from ddpm_ext.ops.row import row_numbers

NO_CLIP = (-math.inf, math.inf)
_lib = torch.library
# Bound once, since the look-up of these attributes would take time in each call.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing


def is_traced() -> bool:
    """Whether torch.compile or torch.jit.trace traces the call, so that it must go through torch.ops."""
    return _is_compiling() or _is_tracing()


# ---------------------------------------------------------------------------------------- shapes of the results


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _written(*_: Any, **__: Any) -> None: ...


def _by_sample(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float32)


for _name in ("reverse_step", "forward_process", "predict_start", "posterior_mean"):
    _lib.register_fake(f"ddpm_ext::{_name}", _like_first)
for _name in ("reverse_step.out", "forward_process.out", "step_with_options"):
    _lib.register_fake(f"ddpm_ext::{_name}", _written)
for _name in ("x_start_scale", "output_scale"):
    _lib.register_fake(f"ddpm_ext::{_name}", _by_sample)


@_lib.register_fake("ddpm_ext::randn")
def _(size: list[int], *_: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


@_lib.register_fake("ddpm_ext::diffusion_loss")
def _(model_output: Tensor, *_: Any, reduction: int = 0, want_slope: bool = False, **__: Any) -> tuple[Tensor, Tensor]:
    loss = model_output.new_empty(model_output.shape[:1] if reduction == 1 else (), dtype=torch.float32)
    float32 = torch.float32
    slope = torch.empty_like(model_output, dtype=float32) if want_slope else model_output.new_empty((0,), dtype=float32)
    return loss, slope


@_lib.register_fake("ddpm_ext::draw_seed")
def _() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


# Inductor before torch 2.15 (seen in 2.11) may reorder the draws of seeds, which no data connects, so that the noise
# differs from that of eager code. An ordered effect keeps the order of the code.
if TORCH < (2, 15):
    from torch._higher_order_ops import effects

    effects._register_effectful_op(torch.ops.ddpm_ext.draw_seed.default, effects._EffectType.ORDERED)


# ---------------------------------------------------------------------------------------------------- gradients


def _affine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, y, table, t, ctx.index = inputs
    ctx.save_for_backward(table, t)
    ctx.y_dtype = y.dtype


def _scale(grad: Tensor, table: Tensor, t: Tensor | None, index: int) -> Tensor:
    return torch.ops.ddpm_ext.forward_process(grad, table, t, index, None, False)


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, t = ctx.saved_tensors
    needs_x, needs_y, *_ = ctx.needs_input_grad
    grad_x = _scale(grad, table, t, ctx.index) if needs_x else None
    grad_y = _scale(grad, table.flip(1), t, ctx.index).to(ctx.y_dtype) if needs_y else None
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


def _clamp_has_gradient_at_edges() -> bool:
    """Whether torch.clamp's gradient at the edges of its range is 1, as in older versions of torch. Otherwise it is 0.

    The clamp's autograd node is called directly. A backward pass would start autograd's threads while this module is
    imported. They would query the driver for GPUs, and a process that forks later could run no backward pass.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), device="cpu")
        node: Any = one.clone().requires_grad_().clamp(-1, 1).grad_fn
        return bool(node(one))


_EDGES_HAVE_GRADIENT = _clamp_has_gradient_at_edges()


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_t, model_output, table, t, ctx.index, ctx.clip_min, ctx.clip_max, *_ = inputs
    ctx.save_for_backward(x_t, model_output, table, t)
    ctx.inputs = len(inputs)


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_t, model_output, table, t = ctx.saved_tensors
    row = row_numbers(table, ctx.index if t is None else t, x_t, torch.float32)
    clipped = row.c0 * grad
    if (ctx.clip_min, ctx.clip_max) != NO_CLIP:
        # predict_start has the bits of the step's x_start, so the gradient is 0 for exactly the elements that the step
        # clipped.
        x_start = torch.ops.ddpm_ext.predict_start(x_t.float(), model_output, table[:, :2].contiguous(), t, ctx.index)
        inside = (x_start > ctx.clip_min) & (x_start < ctx.clip_max)
        if _EDGES_HAVE_GRADIENT:
            inside = (x_start >= ctx.clip_min) & (x_start <= ctx.clip_max)
        clipped = torch.where(inside, clipped, 0.0)
    grads: list[Any] = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        grads[0] = (row.a * clipped + row.c1 * grad).to(x_t.dtype)
    if ctx.needs_input_grad[1]:
        grads[1] = (row.b * clipped + row.c2 * grad).to(model_output.dtype)
    if ctx.needs_input_grad[7]:
        grads[7] = (row.s * grad).to(x_t.dtype)
    return tuple(grads)


_lib.register_autograd("ddpm_ext::reverse_step", _step_backward, setup_context=_step_setup)


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass with create_graph=True, where the gradient would count as a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("diffusion_loss: a second derivative is asked for, expected the first (backend='reference')")


def by_sample(grad: Tensor, slope: Tensor) -> Tensor:
    """The gradient that arrives at a loss, a scalar or (batch,), in a shape that broadcasts against its slope."""
    return grad.reshape(-1, *[1] * (slope.dim() - 1))


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.inputs, ctx.has_slope = inputs[0].dtype, len(inputs), keyword_only_inputs["want_slope"]


def _loss_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    refuse_second_derivative()
    if not ctx.has_slope:
        raise RuntimeError("diffusion_loss: want_slope is False, expected True where a gradient is asked for")
    (slope,) = ctx.saved_tensors
    return (slope * by_sample(grad, slope)).to(ctx.dtype), *[None] * (ctx.inputs - 1)


_lib.register_autograd("ddpm_ext::diffusion_loss", _loss_backward, setup_context=_loss_setup)
