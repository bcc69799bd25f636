"""A step of an accelerated object: the peer's p_sample, ddim_sample or ddim_reverse_sample in one launch; and loops."""

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
FLOAT32 = (torch.float32,)  # the peer's float32 tables make float32 of other dtypes
OF_CALL = ("model", "x", "t", "shape", "noise", "device", "progress")  # arguments that are no options of a step
GRADIENT = "a gradient is asked for through a step"


class DrawnNoise(TorchFunctionMode):
    """Gives noise that was drawn already to the peer's own code, where that draws it."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.randn_like:
            return self.noise
        return function(*args, **(kwargs or {}))


def check_inputs(tables: FusedTables, x: Tensor, t: Any, noise: Tensor | None = None) -> None:
    """Raises Fallback where the operators can't take samples x, timesteps t and the noise."""
    check_tensors(x, dtypes=FLOAT32)
    if not isinstance(t, Tensor) or t.shape != (len(x),) or (noise is not None and noise.shape != x.shape):
        raise Fallback  # the peer raises an error
    check_batch(x, t, noise, FLOAT32)
    try:
        ops.TableStep(tables.get("steps", x.device), add_noise=False).check(x, t, 0)
    except (TypeError, ValueError):
        raise Fallback from None


def split_output(
    tables: FusedTables, x: Tensor, output: Any, instead: Function | None = None
) -> tuple[Tensor, Tensor | None]:
    """A model's output as its prediction and its variance, which is None where it is not learned.

    x has a dimension of channels. Raises Fallback, with `instead`, where the output is none that the operators take.
    """
    batch, channels, *others = x.shape
    shape = torch.Size((batch, 2 * channels, *others)) if tables.learned else x.shape
    if isinstance(output, Tensor) and output.shape != shape:
        raise Fallback(None, instead)  # the peer raises an error
    # The predicted clean sample is returned in the dtype in which the model predicts it.
    check_output(x, output, instead, allow_16_bits=tables.prediction != "x0", shape=shape)
    return (output[:, :channels], output[:, channels:]) if tables.learned else (output, None)


def _take_step(
    method: str,
    peer: Any,
    given: Any,
    x: Tensor,
    t: Tensor,
    row: int | None = None,
    model_t: Tensor | None = None,
    rng: Philox | None = None,
    with_x0: bool = True,
) -> dict[str, Tensor]:
    """One step by `method`. Raises Fallback.

    Args:
        given: the arguments of the peer's method or loop, as attributes.
        row, model_t, rng: in a loop, the timestep as an int, what a model gets for it, (batch,), and the loop's noise.
        with_x0: whether the predicted clean samples are returned, too.
    """
    clip = (-1.0, 1.0) if given.clip_denoised else None
    denoised_fn, cond_fn, model_kwargs = given.denoised_fn, getattr(given, "cond_fn", None), given.model_kwargs
    eta: Any = getattr(given, "eta", None)
    fused, ddpm = tables_of(peer), method == "p_sample"
    tables = fused.rows(method, eta, clip is not None or denoised_fn is not None)
    if row is None:
        check_inputs(fused, x, t)
    else:  # t is the loop's own
        check_tensors(x, dtypes=FLOAT32)
        if x.shape[0] != t.shape[0] or x.device != t.device:
            raise Fallback
    if wants_gradient(x):
        raise Fallback(GRADIENT)
    if x.dim() < 2 or (cond_fn is not None and model_kwargs is None):
        raise Fallback
    device, kwargs = x.device, model_kwargs or {}
    at: int | Tensor = t if row is None else row
    if model_t is None:
        model_t = t if fused.model_gets_t else fused.model_timesteps(device)[t]

    output = given.model(x, timesteps_for(peer, fused, given.model, t, model_t), **kwargs)
    results: dict[str, Any] = {"model": output}  # of functions that must not be called again
    noise: Tensor | None = None

    def own_step() -> Any:
        functions = {name: returning(result) for name, result in results.items()}
        with contextlib.nullcontext() if noise is None else DrawnNoise(noise):
            return _take_own_step(method, peer, given._replace(**functions), x, t)

    if isinstance(output, Tensor) and wants_gradient(output):
        raise Fallback(GRADIENT, own_step)
    prediction, variance = split_output(fused, x, output, own_step)
    needed: Tensor | None = prediction
    extras: dict[str, Any] = {}
    if ddpm and variance is not None:
        extras["model_variance"] = variance

    if denoised_fn is not None:
        x_start = prediction
        if fused.prediction != "x0":
            x_start = ops.predict_start(x, prediction, tables.get("predict", device, torch.float32), at)
        if fused.prediction == "x_prev" and (laid := layout_arguments(prediction, x)):
            x_start = laid["out"].copy_(x_start)
        x_start = results["denoised_fn"] = denoised_fn(x_start)
        if not is_like(x_start, x) or wants_gradient(x_start) or x_start.dtype != x.dtype:
            reason = "what denoised_fn returns is no plain tensor like the samples, without a gradient"
            raise Fallback(reason, own_step)
        extras["x_start"] = x_start
        needed = prediction if ddpm and fused.prediction == "x_prev" else None

    draws = method != "ddim_reverse_sample" and peer.accelerated.noise == "torch"
    if draws and ddpm:  # before cond_fn, which may draw, too
        noise = torch.randn_like(x)
    if cond_fn is not None:
        gradient = results["cond_fn"] = cond_fn(x, timesteps_for(peer, fused, cond_fn, t, model_t), **kwargs)
        wide = not ddpm and (not isinstance(gradient, Tensor) or gradient.dtype == torch.float64)
        if wide or not is_like(gradient, x) or wants_gradient(gradient):
            reason = "what cond_fn returns is no plain tensor like the samples, without a gradient"
            raise Fallback(reason, own_step)
        extras["gradient"] = gradient.float()
    if draws and noise is None:
        noise = torch.randn_like(x)

    if ddpm or (method == "ddim_sample" and eta > 0):
        if noise is not None:
            extras |= noise_arguments(noise, x)
        else:
            extras["rng"] = peer.accelerated.rng_of_step_at(t, peer.num_timesteps) if rng is None else rng
    first = x  # in the peer's formula, which a cond_fn begins anew in DDIM
    if cond_fn is None or ddpm:
        first = results["denoised_fn"] if needed is None else x if fused.prediction == "eps" else prediction
    extras |= layout_arguments(first, x)
    x0 = empty_like(extras.get("out", x)) if with_x0 else None
    sample = take_step(tables, x, needed, at, clip, x0_out=x0, **extras)
    return {"sample": sample} if x0 is None else {"sample": sample, "pred_xstart": x0}


def _take_own_step(method: str, peer: Any, given: Any, x: Tensor, t: Tensor, *_: Any) -> dict[str, Tensor]:
    options = {name: value for name, value in given._asdict().items() if name not in OF_CALL}
    return peer_method(peer, method)(given.model, x, t, **options)


def _take_any_step(method: str, peer: Any, given: Any, x: Tensor, t: Tensor, *of_loop: Any) -> dict[str, Tensor]:
    """One step, by the rows or by a method of somebody's own. Raises Fallback."""
    functions = given.denoised_fn, getattr(given, "cond_fn", None)
    code = [getattr(function, "__code__", function) for function in functions]  # the same of a lambda in each call
    options = (given.clip_denoised, *code, kinds_of(given.model_kwargs))
    return peer._step(  # noqa: SLF001 (of this package)
        method,
        x,
        lambda: t.tolist(),
        (*options, getattr(given, "eta", None)),
        functools.partial(_take_step, method, peer, given, x, t, *of_loop),
        functools.partial(_take_own_step, method, peer, given, x, t),
    )


# By the peer's method: (peer, given, x, t, ...) takes a step, fused or by the peer's own code.
STEPS: dict[str, Function] = {
    method: with_fallback(method, _take_own_step)(functools.partial(_take_any_step, method))
    for method in ("p_sample", "ddim_sample", "ddim_reverse_sample")
}


def take_loop(peer: Any, method: str, given: Any, with_x0: bool = True) -> Iterator[dict[str, Tensor]]:
    """A loop's steps by `method`, as the peer's progressive loops yield them.

    given: the arguments of the peer's loop, as attributes.
    """
    device, shape, noise = given.device, given.shape, given.noise
    if device is None:
        device = next(given.model.parameters()).device
    assert isinstance(shape, tuple | list)
    x, rng = noise, peer.accelerated.whole_loop(int(shape[0]) if noise is None else len(noise))
    if x is None:
        x = start_noise(shape, rng, device)
    rows: Any = range(peer.num_timesteps)[::-1]
    if given.progress:
        from tqdm.auto import tqdm

        rows = tqdm(rows)
    # All steps' timesteps are made at once: the model gets a row of these, so no step makes a tensor or waits for one.
    timesteps = torch.arange(peer.num_timesteps, device=device)[:, None].repeat(1, shape[0])
    model_timesteps = timesteps
    with contextlib.suppress(Fallback):  # each step says why it falls back
        fused = tables_of(peer)
        if not fused.model_gets_t:
            model_timesteps = fused.model_timesteps(timesteps.device)[:, None].repeat(1, shape[0])
    for row in rows:
        with torch.no_grad():
            t = timesteps[row]
            model_t = t if model_timesteps is timesteps else model_timesteps[row]
            out = STEPS[method](peer, given, x, t, row, model_t, rng, with_x0)
            yield out
            x = out["sample"]
