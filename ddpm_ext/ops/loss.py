"""The training loss as an operator.

Its kernel computes the target in registers. It can draw the noise of x_t again, so the noise need not be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.checks import split_t
from ddpm_ext.ops import torch_library as _registration
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.loss_kinds import LOSSES, REDUCTIONS, check_options
from ddpm_ext.ops.noise import NO_RNG, STREAM_FORWARD, Philox, fresh_arguments, noise_arguments


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
    """The loss of a model's output with the target k0 x_start + k1 z, and its gradient, in one launch.

    A sample's loss is the mean over its elements, times its row's weight. The sum has one fixed order, so that its bits
    are the same in every batch, with every number of threads, on the CPU and on a GPU.

    Args:
        model_output: (batch, ...), float32, float16 or bfloat16. Its precision may be lower than x_start's.
        x_start: (batch, ...). It may be None if k0 is 0 in all rows, as for a model that predicts the noise.
        table: float32 (rows, 4), with k0, k1, the weight and a zero. With `variational` it is (rows, 8), see
            csrc/core/loss.h.
        t: row of each sample, int64 (batch,), or one int for all, in [0, rows).
        loss: the function of an element's difference d. "mse" is d^2, "l1" is |d|, and "huber" is d^2 / 2 where
            |d| <= delta, else delta (|d| - delta / 2), as in torch.
        noise: z, like x_start. With None, `rng` draws it (stream 2, draw t), so it must be the rng that drew the noise
            in the model's input.
        reduction: "mean" or "sum" of the samples' losses, or "none".
        variational: whether to add a term of the variational bound, which needs x_start. The model's output may then
            have twice the channels: the prediction in the first half, the variance in the second.
        detach_mean: whether that term has no gradient with respect to the prediction.

    Returns:
        A scalar, or with reduction="none" (batch,); float32. It is differentiable once, in model_output.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range; x_start or
            noise requires a gradient; x_start is missing with `variational`; noise and rng are both or neither given.
        RuntimeError: in a second derivative (backend="reference" has it).

    Examples:
        >>> from ddpm_ext import ops
        >>> of_the_noise = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # k0, k1, the weight, and a zero
        >>> loss = ops.diffusion_loss(model(x_t, 0), None, of_the_noise, 0, rng=Philox(seed=0))
    """
    check_options(loss, delta, reduction)
    for name, value in (("model_output", model_output), ("table", table), ("x_start", x_start)):
        if value is not None or name != "x_start":
            checks.tensor(name, value)
    if noise is None and rng is None:
        raise ValueError("noise and rng are both None, expected the one that made the model's input")
    options: dict[str, Any] = {"loss": loss, "delta": delta, "reduction": reduction}
    options.update(variational=variational, detach_mean=detach_mean)  # not |=, which torch.compile of 2.7 does not take
    return LossStep(x_start, table, t, model_output.device, noise=noise, rng=rng, **options).loss(model_output)


class LossStep:
    """The two launches of a training step: a draw of x_t from q(x_t | x_0), and diffusion_loss of the model's output.

    The constructor converts the arguments. It raises the errors below, so that they come before the model is called.

    Args:
        device: the samples' device.
        noise, rng: see diffusion_loss. Without both, a seed is drawn from torch's default generator.
        loss, delta, reduction: see diffusion_loss. The caller has checked them by check_options.
        The other arguments are those of diffusion_loss.

    Attributes:
        noise: the noise that the caller passed, or that `noised` stored. With None, both launches draw it from rng.

    Raises:
        TypeError, ValueError: t, noise or rng has a wrong type or is out of range; x_start or noise requires a
            gradient.
    """

    def __init__(
        self,
        x_start: Tensor | None,
        table: Tensor,
        t: int | Tensor,
        device: torch.device,
        *,
        noise: Tensor | None,
        rng: Philox | None,
        loss: str,
        delta: float,
        reduction: str,
        variational: bool,
        detach_mean: bool,
    ) -> None:
        self._rows = x_start, table
        self._t = (t, 0) if isinstance(t, Tensor) else split_t(t)
        self._traced = torch.compiler.is_compiling() or torch._C._is_tracing()
        self.noise: Tensor | None = None
        self._rng: Sequence[Any]
        if noise is None and rng is None:
            self._rng = fresh_arguments(STREAM_FORWARD, device, self._traced)
        else:
            self.noise, _, *self._rng = noise_arguments(noise, rng, False, STREAM_FORWARD, device)
        if torch.is_grad_enabled():
            for name, tensor in (("x_start", x_start), ("noise", noise)):
                if tensor is not None and tensor.requires_grad:
                    raise ValueError(
                        f"diffusion_loss: {name} requires a gradient, expected none (backend='reference' has it)"
                    )
        self._loss_kind = LOSSES.index(loss), float(delta)
        self._reduction_options = REDUCTIONS.index(reduction), variational, detach_mean
        self._overwrite_noise = False

    def noised(self, x_start: Tensor, table: Tensor, keep_noise: bool) -> Tensor:
        """x_t, by forward_process with the step's t and noise.

        Args:
            keep_noise: whether to store the noise for `loss`, on a CPU, where reading it takes less time than drawing
                it again. It is stored only for a float32 x_t that is neither traced nor differentiated. The launch of
                `loss` overwrites the noise with the gradient, so no more memory is needed at the peak.
        """
        if self._traced:
            return torch.ops.ddpm_ext.forward_process(
                x_start, table, *self._t, self.noise, self.noise is None, *self._rng
            )
        if not (keep_noise and self.noise is None):
            return C.forward_process(x_start, table, *self._t, self.noise, self.noise is None, *self._rng)
        x_t, noise = C.forward_process_and_noise(x_start, table, *self._t, None, True, *self._rng)
        if noise is not None:
            self.noise, self._rng, self._overwrite_noise = noise, NO_RNG, True
        return x_t

    def loss(self, model_output: Tensor) -> Tensor:
        """diffusion_loss of the model's output."""
        arguments = (model_output, *self._rows, *self._t, *self._loss_kind, self.noise, *self._rng)
        reduction, variational, detach_mean = self._reduction_options
        want_slope = torch.is_grad_enabled() and model_output.requires_grad
        if not self._traced:
            flags = (reduction, want_slope, variational, detach_mean, self._overwrite_noise)
            return _DiffusionLoss.apply(flags, *arguments)
        return torch.ops.ddpm_ext.diffusion_loss(
            *arguments, reduction=reduction, want_slope=want_slope, variational=variational, detach_mean=detach_mean
        )[0]


class _DiffusionLoss(torch.autograd.Function):
    """Autograd's function for the loss in eager calls. Torch's dispatcher would take longer than a small loss."""

    @staticmethod
    def forward(ctx: Any, flags: tuple[int, bool, bool, bool, bool], *arguments: Any) -> Tensor:
        loss, slope = C.diffusion_loss(*arguments, *flags)
        ctx.save_for_backward(slope)
        # With hooks of saved tensors, other code may use the saved slope later, so backward must not write to it.
        ctx.hooked = C.has_saved_tensors_hooks()
        ctx.dtype, ctx.inputs = arguments[0].dtype, len(arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _registration.refuse_second_derivative()
        (slope,) = ctx.saved_tensors
        return None, _gradient(slope, grad, ctx.dtype, ctx.hooked), *[None] * (ctx.inputs - 1)


def _gradient(slope: Tensor, grad: Tensor, dtype: torch.dtype, shared: bool) -> Tensor:
    """slope times grad as `dtype`, in one operation.

    The result overwrites the slope if the dtypes are equal, unless other code or a retained graph may use the slope
    again, or grad is not a plain tensor (see checks.is_plain).

    Args:
        slope: the derivative of the loss with respect to the model's output, float32, of the output's shape.
        grad: the gradient that arrives at the loss in the backward pass, a scalar or (batch,).
        shared: whether other code may use the slope's memory.
    """
    is_plain = checks.is_plain(grad)
    retained = shared or not is_plain or torch._C._autograd._get_current_graph_task_keep_graph()
    if is_plain and grad.dim() == 0 and grad.is_cpu and grad.item() == 1:
        return slope.to(dtype, copy=retained) if retained or slope.dtype != dtype else slope
    factor = _registration.by_sample(grad, slope)
    if slope.dtype == dtype:
        return slope * factor if retained else slope.mul_(factor)
    if not is_plain:
        return (slope * factor).to(dtype)
    return torch.mul(slope, factor, out=torch.empty_like(slope, dtype=dtype))
