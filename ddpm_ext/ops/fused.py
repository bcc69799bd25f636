"""The operators in Python: one launch each, on a CPU or a GPU. `reference` has a twin of each, with the same name.

Eager calls go through pybind11. They use torch's dispatcher only for gradients, tensor subclasses, modes and function
transforms. Calls that torch.compile or torch.jit.trace traces, and all calls of randn, go through torch.ops.ddpm_ext.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.checks import split_t
from ddpm_ext.base.types import Clip
from ddpm_ext.ops import torch_library as _registration
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.loss import LossStep as LossStep
from ddpm_ext.ops.loss import diffusion_loss as diffusion_loss
from ddpm_ext.ops.noise import STREAM_FORWARD, STREAM_REVERSE, Philox, fresh_arguments, noise_arguments
from ddpm_ext.ops.noise import randn as randn
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.ops.scales import output_scale, x_start_scale
from ddpm_ext.ops.step_inputs import DEFAULTS
from ddpm_ext.ops.step_options import refuse_grad, step_with_options
from ddpm_ext.ops.table_step import CalledTableStep, operators_by_name

NO_CLIP = _registration.NO_CLIP


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
    """One step of the reverse process, by row t of a step table. ddpm_ext.tables.step_table has the equation.

    Args:
        x_t: (batch, ...), float32, float16 or bfloat16.
        model_output: like x_t, or of a lower precision.
        table: StepTable.packed, float32 (rows, 24).
        t: each sample's row, int64 (batch,), or one int for all, in [0, rows). Values on a GPU are not checked. For a
            value out of range the kernel takes the nearest row.
        clip: range (low, high) that the predicted clean sample is clipped to, or None.
        noise: replaces drawn noise, like x_t.
        rng: the source of drawn noise (stream 0, the row's draw). With None, torch's default CPU generator draws a
            seed.
        add_noise: False gives the mean, if neither noise nor rng is passed. With one of them it has no effect.
        out: a tensor like x_t for the result, or x_t itself. With `out`, no input may require a gradient.

    Returns:
        x_{t-1}, like x_t. It is differentiable in x_t, model_output and noise.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.

    Examples:
        >>> from ddpm_ext import ops
        >>> table = GaussianDiffusion(1000).table("steps", "x_t", x_t)
        >>> x_before = ops.reverse_step(x_t, model(x_t, 999), table, 999, rng=Philox(seed=0))
    """
    checks.tensor("x_t", x_t)
    checks.tensor("model_output", model_output)
    checks.tensors(out=out)
    checks.tensor("table", table)
    row, index = split_t(t)
    low, high = checks.clip_range(clip) or NO_CLIP
    arguments = (row, index, low, high, *noise_arguments(noise, rng, add_noise, STREAM_REVERSE, x_t.device))
    if not _registration.is_traced():
        return _step(x_t, model_output, table, *arguments, out=out)
    if out is None:
        return torch.ops.ddpm_ext.reverse_step(x_t, model_output, table, *arguments)
    refuse_grad("reverse_step", x_t=x_t, model_output=model_output, noise=noise, out=out)
    torch.ops.ddpm_ext.reverse_step.out(x_t, model_output, table, *arguments, out=out)
    return out


def _step(*arguments: Any, out: Tensor | None, on_host: Tensor | None = None) -> Tensor:
    """Calls the compiled reverse_step, which writes to `out` or to a new tensor."""
    if out is None:
        return C.reverse_step(*arguments, on_host)
    C.reverse_step_out(*arguments, out, on_host)
    return out


class TableStep(CalledTableStep):
    """Takes the steps of one table: by reverse_step, or by step_with_options if a call has optional inputs of that
    operator or no model output.

    The constructor converts the clip, noise and rng once for all calls. If noise is to be drawn without an rng, each
    call draws a seed from torch's default CPU generator.

    Args:
        table, clip, noise, rng, add_noise: see reverse_step.
        on_host: a copy of the table on the CPU, which must not be changed. With it, an int t passes the row's numbers
            to a GPU's kernel as arguments of the launch, so the kernel does not load them from memory.

    Attributes:
        check: (x_t, row, index, out=None) raises the errors that `take` would raise for these arguments, so that the
            errors come before a model is called. It does nothing if torch.compile or torch.jit.trace traces the call.
            `row` and `index` are the results of split_t.
        take: (x_t, model_output, row, index, out=None, **inputs) -> the next samples, like reverse_step. The inputs are
            the tensors and flags of step_with_options, where None counts as missing, and `noise`. `quantile` and
            `maximum` may be passed in place of x_start_scale, and `guidance` and `rescale` in place of output_scale:
            then another launch before the step computes that factor. With any input but noise, no gradients are
            recorded.
    """

    operators = operators_by_name(reverse_step, step_with_options, output_scale, x_start_scale)

    def __init__(
        self,
        table: Tensor,
        *,
        on_host: Tensor | None = None,
        clip: Clip | None = (-1.0, 1.0),
        noise: Tensor | None = None,
        rng: Philox | None = None,
        add_noise: bool = True,
    ) -> None:
        super().__init__(table, clip=clip, noise=noise, rng=rng, add_noise=add_noise)
        self._on_host = None if on_host is table else on_host  # for a table on the CPU, a copy has no use
        self._ends = checks.clip_range(clip) or NO_CLIP
        self._draws_seed = add_noise and noise is None and rng is None
        source = Philox(0) if self._draws_seed else rng  # if calls draw a seed, they replace this Philox
        self._source = noise_arguments(noise, source, False, STREAM_REVERSE, table.device)

    def check(self, x_t: Tensor, row: Tensor | None, index: int, out: Tensor | None = None) -> None:
        if _registration.is_traced():
            return
        checks.tensor("x_t", x_t)
        checks.tensors(out=out)
        C.check_reverse_step(x_t, self._table, row, index, *self._source, out)

    def _launch(
        self,
        x_t: Tensor,
        model_output: Tensor | None,
        row: Tensor | None,
        index: int,
        out: Tensor | None,
        noise: Tensor | None,
        inputs: dict[str, Any],
    ) -> Tensor:
        if _registration.is_traced():
            return super()._launch(x_t, model_output, row, index, out, noise, inputs)
        checks.tensor("x_t", x_t)
        checks.tensors(model_output=model_output, t=row, out=out)
        source = self._source
        if noise is not None:
            source = noise, source[1] and not self._draws_seed, *source[2:]
        elif self._draws_seed:
            source = None, True, *fresh_arguments(STREAM_REVERSE, x_t.device, maybe_traced=False)
        arguments = x_t, model_output, self._table, row, index, *self._ends, *source
        if model_output is not None and not inputs:
            return _step(*arguments, out=out, on_host=self._on_host)
        if out is None:
            out = empty_like(x_t)
        C.step_with_options(*arguments, out, *(DEFAULTS | inputs).values(), self._on_host)
        return out


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
    """k0 x_start + k1 z, with the row (k0, k1) of the table for each sample: x_t, if the row is timestep t's signal and
    noise.

    Args:
        x_start: (batch, ...), float32, float16 or bfloat16.
        table: float32 (rows, 2).
        t: row of each sample, int64 (batch,), or one int for all, in [0, rows).
        noise: replaces drawn noise, like x_start.
        rng: the source of drawn noise (stream 2, draw t). With None, torch's default CPU generator draws a seed.
        add_noise: False gives k0 x_start, if neither noise nor rng is passed. With one of them it has no effect.
        out: a tensor like x_start for the result, or x_start itself. With `out`, no input may require a gradient.

    Returns:
        A tensor like x_start. Differentiable in x_start and noise.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.

    Examples:
        >>> from ddpm_ext import ops
        >>> mixed = ops.forward_process(images, torch.tensor([[0.8, 0.6]]), 0, rng=Philox(seed=0))
    """
    checks.tensor("x_start", x_start)
    checks.tensors(out=out)
    checks.tensor("table", table)
    row, index = split_t(t)
    arguments = (row, index, *noise_arguments(noise, rng, add_noise, STREAM_FORWARD, x_start.device))
    if not _registration.is_traced():
        if out is None:
            return C.forward_process(x_start, table, *arguments)
        C.forward_process_out(x_start, table, *arguments, out)
        return out
    if out is None:
        return torch.ops.ddpm_ext.forward_process(x_start, table, *arguments)
    refuse_grad("forward_process", x_start=x_start, noise=noise, out=out)
    torch.ops.ddpm_ext.forward_process.out(x_start, table, *arguments, out=out)
    return out


def predict_start(x_t: Tensor, noise: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_t + k1 noise, with row t of a table (rows, 2): the clean sample that became x_t by adding this noise.

    Arguments and errors are those of reverse_step, with `noise` as model_output. Differentiable in x_t and noise.

    Examples:
        >>> clean = predict_start(x_t, 0.1 * x_t, torch.tensor([[1.25, -0.75]]), 0)
    """
    return _affine("predict_start", {"x_t": x_t, "noise": noise}, table, t)


def posterior_mean(x_start: Tensor, x_t: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_start + k1 x_t, with row t of a table (rows, 2): the mean of q(x_{t-1} | x_t, x_0).

    Arguments and errors are those of reverse_step. Differentiable in x_start and x_t.

    Examples:
        >>> mean = posterior_mean(images, x_t, torch.tensor([[0.2, 0.8]]), 0)
    """
    return _affine("posterior_mean", {"x_start": x_start, "x_t": x_t}, table, t)


def _affine(op: str, tensors: dict[str, Tensor], table: Tensor, t: int | Tensor) -> Tensor:
    """Checks the arguments of predict_start or posterior_mean, the operator named `op`, and calls it."""
    for name, tensor in (tensors | {"table": table}).items():
        checks.tensor(name, tensor)
    call = getattr(torch.ops.ddpm_ext if _registration.is_traced() else C, op)
    return call(*tensors.values(), table, *split_t(t))
