"""The fused p_sample, ddim_sample and ddim_reverse_sample of guided- and improved-diffusion, and their loops."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback, returning, with_fallback
from ddpm_ext.integrations.guided_diffusion.tables import FusedTables, tables_of, timesteps_for
from ddpm_ext.integrations.peer_diffusion import start_noise
from ddpm_ext.integrations.proof import kinds_of
from ddpm_ext.integrations.row_stepper import take_step
from ddpm_ext.integrations.shared import peer_method
from ddpm_ext.integrations.tensors import (
    check_batch,
    check_output,
    check_tensors,
    is_like,
    layout_arguments,
    noise_arguments,
    wants_gradient,
)
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.result_memory import empty_like

Function = Callable[..., Any]
# The dtypes of samples with a fused form. The library's tables are float32, so its step returns float32 for samples of
# 16 bits.
FLOAT32 = (torch.float32,)
NOT_OPTIONS = (
    "model",
    "x",
    "t",
    "shape",
    "noise",
    "device",
    "progress",
)  # arguments of steps and loops that _take_peers_step does not pass to a step as options
GRADIENT = "a gradient is asked for through a step"


class DrawnNoise(TorchFunctionMode):
    """A mode in which torch.randn_like returns noise that was drawn before, so that the library's code uses it."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.randn_like:
            return self.noise
        return function(*args, **(kwargs or {}))


def check_inputs(tables: FusedTables, x: Tensor, t: Any, noise: Tensor | None = None) -> None:
    """Raises Fallback if the operators can't take samples x, timesteps t and the noise."""
    check_tensors(x, dtypes=FLOAT32)
    if not isinstance(t, Tensor) or t.shape != (len(x),) or (noise is not None and noise.shape != x.shape):
        raise Fallback  # no warning, since the library raises an error
    check_batch(x, t, noise, FLOAT32)
    try:
        ops.TableStep(tables.get("steps", x.device), add_noise=False).check(x, t, 0)
    except (TypeError, ValueError):
        raise Fallback from None


def split_output(
    tables: FusedTables, x: Tensor, output: Any, instead: Function | None = None
) -> tuple[Tensor, Tensor | None]:
    """Splits a model's output into its prediction and its variance: None for a model without learned variance.

    x must have a dimension of channels. Raises Fallback, with `instead`, if the operators can't take the output.
    """
    batch, channels, *sizes = x.shape
    shape = torch.Size((batch, 2 * channels, *sizes)) if tables.learned else x.shape
    if isinstance(output, Tensor) and output.shape != shape:
        raise Fallback(None, instead)  # the library raises an error
    # A predicted clean sample must have the samples' dtype, because the library returns it in the model's dtype.
    check_output(x, output, instead, allow_16_bits=tables.prediction != "x0", shape=shape)
    return (output[:, :channels], output[:, channels:]) if tables.learned else (output, None)


def _take_step(
    method: str,
    peer: Any,
    args: Any,
    x: Tensor,
    t: Tensor,
    row: int | None = None,
    model_t: Tensor | None = None,
    rng: Philox | None = None,
    with_x0: bool = True,
) -> dict[str, Tensor]:
    """The results of one step of the library's method `method`, computed by a row. Raises Fallback if there is no row.

    Args:
        args: the arguments of the library's method or loop, as attributes.
        row: in a loop, the timestep as an int.
        model_t: in a loop, the timesteps that the model gets, (batch,).
        rng: in a loop, the generator of its noise.
        with_x0: whether to also return the predicted clean samples.
    """
    clip = (-1.0, 1.0) if args.clip_denoised else None
    denoised_fn, cond_fn, model_kwargs = args.denoised_fn, getattr(args, "cond_fn", None), args.model_kwargs
    eta: Any = getattr(args, "eta", None)
    fused, ddpm = tables_of(peer), method == "p_sample"
    tables = fused.rows(method, eta, clip is not None or denoised_fn is not None)
    if row is None:
        check_inputs(fused, x, t)
    else:  # take_loop has made t, so its values are not checked
        check_tensors(x, dtypes=FLOAT32)
        if x.shape[0] != t.shape[0] or x.device != t.device:
            raise Fallback
    if wants_gradient(x):
        raise Fallback(GRADIENT)
    if x.dim() < 2 or (cond_fn is not None and model_kwargs is None):
        raise Fallback
    device, kwargs = x.device, model_kwargs or {}
    row_or_t: int | Tensor = t if row is None else row
    if model_t is None:
        model_t = t if fused.model_gets_t else fused.model_timesteps(device)[t]

    output = args.model(x, timesteps_for(peer, fused, args.model, t, model_t), **kwargs)
    results: dict[str, Any] = {"model": output}  # of the caller's functions: peers_step must not call these again
    noise: Tensor | None = None

    def peers_step() -> Any:
        functions = {name: returning(result) for name, result in results.items()}
        with contextlib.nullcontext() if noise is None else DrawnNoise(noise):
            return _take_peers_step(method, peer, args._replace(**functions), x, t)

    if isinstance(output, Tensor) and wants_gradient(output):
        raise Fallback(GRADIENT, peers_step)
    prediction, variance = split_output(fused, x, output, peers_step)
    prediction_or_none: Tensor | None = prediction
    extras: dict[str, Any] = {}
    if ddpm and variance is not None:
        extras["model_variance"] = variance

    if denoised_fn is not None:
        x_start = prediction
        if fused.prediction != "x0":
            x_start = ops.predict_start(x, prediction, tables.get("predict", device, torch.float32), row_or_t)
        if fused.prediction == "x_prev" and (out_argument := layout_arguments(prediction, x)):
            x_start = out_argument["out"].copy_(x_start)
        x_start = results["denoised_fn"] = denoised_fn(x_start)
        if not is_like(x_start, x) or wants_gradient(x_start) or x_start.dtype != x.dtype:
            reason = "what denoised_fn returns is no plain tensor like the samples, without a gradient"
            raise Fallback(reason, peers_step)
        extras["x_start"] = x_start
        prediction_or_none = prediction if ddpm and fused.prediction == "x_prev" else None

    draws = method != "ddim_reverse_sample" and peer.accelerated.noise == "torch"
    if draws and ddpm:  # drawn before the call of cond_fn, as in the library's code, because cond_fn may also draw
        noise = torch.randn_like(x)
    if cond_fn is not None:
        gradient = results["cond_fn"] = cond_fn(x, timesteps_for(peer, fused, cond_fn, t, model_t), **kwargs)
        is_float64 = not ddpm and (not isinstance(gradient, Tensor) or gradient.dtype == torch.float64)
        if is_float64 or not is_like(gradient, x) or wants_gradient(gradient):
            reason = "what cond_fn returns is no plain tensor like the samples, without a gradient"
            raise Fallback(reason, peers_step)
        extras["gradient"] = gradient.float()
    if draws and noise is None:
        noise = torch.randn_like(x)

    if ddpm or (method == "ddim_sample" and eta > 0):
        if noise is not None:
            extras |= noise_arguments(noise, x)
        else:
            extras["rng"] = peer.accelerated.rng_of_step_at(t, peer.num_timesteps) if rng is None else rng
    # The first operand of the library's formula for the next sample, which determines the strides of the result; see
    # layout_arguments. In DDIM with a cond_fn it is x.
    first_operand = x
    if cond_fn is None or ddpm:
        first_operand = (
            results["denoised_fn"] if prediction_or_none is None else x if fused.prediction == "eps" else prediction
        )
    extras |= layout_arguments(first_operand, x)
    x0 = empty_like(extras.get("out", x)) if with_x0 else None
    sample = take_step(tables, x, prediction_or_none, row_or_t, clip, x0_out=x0, **extras)
    return {"sample": sample} if x0 is None else {"sample": sample, "pred_xstart": x0}


def _take_peers_step(method: str, peer: Any, args: Any, x: Tensor, t: Tensor, *_: Any) -> dict[str, Tensor]:
    options = {name: value for name, value in args._asdict().items() if name not in NOT_OPTIONS}
    return peer_method(peer, method)(args.model, x, t, **options)


def _take_any_step(method: str, peer: Any, args: Any, x: Tensor, t: Tensor, *loop_arguments: Any) -> dict[str, Tensor]:
    """The results of one step, by a row or by a user's override of the library's method.

    Raises Fallback if the library's code must run.
    """
    functions = args.denoised_fn, getattr(args, "cond_fn", None)
    # The functions' code objects are in the cache key, since callers may create the same lambda anew in each call.
    code = [getattr(function, "__code__", function) for function in functions]
    options = (args.clip_denoised, *code, kinds_of(args.model_kwargs))
    return peer._step(  # noqa: SLF001 (of this package)
        method,
        x,
        lambda: t.tolist(),
        (*options, getattr(args, "eta", None)),
        functools.partial(_take_step, method, peer, args, x, t, *loop_arguments),
        functools.partial(_take_peers_step, method, peer, args, x, t),
    )


# {name of the library's method: a function of (peer, args, x, t, ...) that takes a step of this method, fused or not}.
STEPS: dict[str, Function] = {
    method: with_fallback(method, _take_peers_step)(functools.partial(_take_any_step, method))
    for method in ("p_sample", "ddim_sample", "ddim_reverse_sample")
}


def take_loop(peer: Any, method: str, args: Any, with_x0: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yields the results of a loop's steps by `method`, as the library's progressive loops do.

    Args:
        args: the arguments of the library's loop, as attributes.
    """
    device, shape, noise = args.device, args.shape, args.noise
    if device is None:
        device = next(args.model.parameters()).device
    assert isinstance(shape, tuple | list)
    x, rng = noise, peer.accelerated.whole_loop(int(shape[0]) if noise is None else len(noise))
    if x is None:
        x = start_noise(shape, rng, device)
    rows: Any = range(peer.num_timesteps)[::-1]
    if args.progress:
        from tqdm.auto import tqdm

        rows = tqdm(rows)
    # The timesteps of all steps are created at once. The model gets a row of this tensor, so no step creates a tensor.
    timesteps = torch.arange(peer.num_timesteps, device=device)[:, None].repeat(1, shape[0])
    model_timesteps = timesteps
    with contextlib.suppress(Fallback):  # each step records why it falls back
        fused = tables_of(peer)
        if not fused.model_gets_t:
            model_timesteps = fused.model_timesteps(timesteps.device)[:, None].repeat(1, shape[0])
    for row in rows:
        with torch.no_grad():
            t = timesteps[row]
            model_t = t if model_timesteps is timesteps else model_timesteps[row]
            out = STEPS[method](peer, args, x, t, row, model_t, rng, with_x0)
            yield out
            x = out["sample"]
