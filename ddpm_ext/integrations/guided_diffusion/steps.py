"""A step of an accelerated object: the peer's p_sample, ddim_sample or ddim_reverse_sample in one launch; and loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ext import ops, randn
from ddpm_ext.base.checks import is_plain
from ddpm_ext.integrations.guided_diffusion.plan import Plan, Rows
from ddpm_ext.integrations.shared import drawn, misfit, wants_gradient

if TYPE_CHECKING:
    from ddpm_ext.integrations.guided_diffusion.classes import Guided

__all__ = ["Asked", "fits", "given", "halves", "take", "walk", "why_not"]

Function = Callable[..., Any]
LOWER = (torch.float16, torch.bfloat16)
SAMPLERS = {"p_sample": "ddpm", "ddim_sample": "ddim", "ddim_reverse_sample": "inverse"}
NO_ETA: Any = object()
GRADIENT = "a gradient is asked for through a step"


class Asked(NamedTuple):
    """What a step is asked for beside its samples: arguments of the peer's p_sample and ddim_sample."""

    model: Function
    clip_denoised: bool
    denoised_fn: Function | None
    cond_fn: Function | None
    model_kwargs: dict[str, Any] | None
    eta: Any = NO_ETA

    def options(self, **changes: Any) -> dict[str, Any]:
        """All but the model, as the peer's own method takes them."""
        options = {name: value for name, value in self._asdict().items() if name != "model"} | changes
        if self.cond_fn is None:  # which some methods don't know
            del options["cond_fn"]
        if self.eta is NO_ETA:
            del options["eta"]
        return options


class Drawn(TorchFunctionMode):
    """Hands noise that was drawn already to the peer's own code, where that draws it."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.randn_like:
            return self.noise
        return function(*args, **(kwargs or {}))


def given(value: Any) -> Function:
    """A function in place of one that was called already."""
    return lambda *_, **__: value


def why_not(plan: Plan, x: Tensor, t: Any, noise: Tensor | None = None) -> str | None:
    """Why the operators can't take these: a reason, "" where the peer's own code is to raise, None: they can."""
    why = _unfit(x) if plan.why is None else plan.why
    if why is not None:
        return why
    if not isinstance(t, Tensor) or t.shape != (len(x),) or (noise is not None and noise.shape != x.shape):
        return ""
    if t.dtype != torch.int64:
        return f"its timesteps are {str(t.dtype).removeprefix('torch.')}"
    if noise is not None and (misfit(x, noise) is not None or noise.dtype != x.dtype):
        return "its noise is no plain float32 tensor on the samples' device"
    try:
        ops.check_reverse_step(x, plan.steps(x.device), t)
    except (TypeError, ValueError):
        return ""
    return None


def _plain(x: Any) -> bool:
    """Whether it is a tensor, of no subclass and no function transform; a compiler sees those itself."""
    return type(x) is Tensor and (torch.compiler.is_compiling() or is_plain(x))


def _unfit(x: Tensor) -> str | None:
    why = misfit(x)
    if why is None and x.dtype != torch.float32:  # its float32 tables make float32 of these
        why = f"its samples are {str(x.dtype).removeprefix('torch.')}"
    return why


def halves(plan: Plan, x: Tensor, output: Any) -> tuple[Tensor, Tensor | None] | str:
    """A model's output as its prediction and, where that is learned, its variance; or why it is not taken, as why_not.

    x has a channels' dimension.
    """
    if not _plain(output):
        return "the model's output is no plain tensor"
    batch, channels, *others = x.shape
    shape = x.shape if not plan.learned else (batch, 2 * channels, *others)
    if output.shape != shape or output.device != x.device:
        return ""
    # a clean sample is handed out in the dtype in which the model predicts it
    if output.dtype != x.dtype and (output.dtype not in LOWER or plan.prediction == "x0"):
        return f"the model's output is {str(output.dtype).removeprefix('torch.')}"
    if not plan.learned:
        return output, None
    return output[:, :channels], output[:, channels:]


def fits(y: Any, x: Tensor) -> bool:
    """Whether y is a plain tensor of x's shape, on its device, to whom no gradient goes."""
    return _plain(y) and y.shape == x.shape and y.device == x.device and not wants_gradient(y)


def _why_not(plan: Plan, rows: Rows | str, asked: Asked, x: Tensor, t: Tensor, at: int | None) -> str | None:
    if isinstance(rows, str):
        return rows
    if at is None:
        why = why_not(plan, x, t)
    else:  # a row of the loop's own timesteps
        why = _unfit(x)
        if why is None and (x.shape[0] != t.shape[0] or x.device != t.device):
            why = ""
    if why is not None:
        return why
    if wants_gradient(x):
        return GRADIENT
    if x.dim() < 2 or (asked.cond_fn is not None and asked.model_kwargs is None):
        return ""
    return None


def take(
    peer: Guided,
    method: str,
    asked: Asked,
    x: Tensor,
    t: Tensor,
    at: int | None = None,
    told: Tensor | None = None,
    hand_out: bool = True,
) -> dict[str, Tensor]:
    """One step by `method`, as its arguments say.

    Args:
        at, told: in a loop, the timestep, and what a model is told of it, (batch,).
        hand_out: whether the predicted clean samples are asked for, too.
    """
    own: Function = peer._own(method)
    plan = peer._plan
    rows: Rows | str | None = plan.why
    if rows is None:
        changed = bool(asked.clip_denoised) or asked.denoised_fn is not None
        rows = plan.rows(SAMPLERS[method], asked.eta, changed)
    why = _why_not(plan, rows, asked, x, t, at)
    if why is not None or isinstance(rows, str):
        peer._aside(method, why or None)
        return own(asked.model, x, t, **asked.options())
    tables, device = rows.tables, x.device
    row: int | Tensor = t if at is None else at
    clip = (-1.0, 1.0) if asked.clip_denoised else None
    if told is None:
        told = t if plan.tells_t else plan.told(device)[t]
    known = asked.model_kwargs or {}

    output = asked.model(x, t if peer._maps(asked.model) else told, **known)
    parts = GRADIENT if isinstance(output, Tensor) and wants_gradient(output) else halves(plan, x, output)
    if isinstance(parts, str):
        peer._aside(method, parts or None)
        return own(given(output), x, t, **asked.options())
    prediction, variance = parts
    needed: Tensor | None = prediction
    extras: dict[str, Any] = {}
    if rows.learned:
        extras["model_variance"] = variance

    seen: dict[str, Any] = {}  # in place of functions that were called already
    if asked.denoised_fn is not None:
        x_start = prediction
        if plan.prediction != "x0":
            x_start = ops.predict_start(x, prediction, tables.get("predict", device, torch.float32), row)
        x_start = asked.denoised_fn(x_start)
        seen["denoised_fn"] = given(x_start)
        if not fits(x_start, x) or x_start.dtype != x.dtype:
            peer._aside(method, "what denoised_fn returns is no plain tensor like the samples, without a gradient")
            return own(given(output), x, t, **asked.options(**seen))
        extras["x_start"] = x_start
        needed = prediction if rows.keeps else None

    draws, rng, noise = SAMPLERS[method] != "inverse", peer.accelerated.rng, None
    if draws and rng is None and method == "p_sample":  # before cond_fn, which may draw, too
        noise = torch.randn_like(x)
    if asked.cond_fn is not None:
        gradient = asked.cond_fn(x, t if peer._maps(asked.cond_fn) else told, **known)
        wide = method != "p_sample" and (not isinstance(gradient, Tensor) or gradient.dtype == torch.float64)
        if wide or not fits(gradient, x):
            peer._aside(method, "what cond_fn returns is no plain tensor like the samples, without a gradient")
            seen["cond_fn"] = given(gradient)
            if noise is None:
                return own(given(output), x, t, **asked.options(**seen))
            with Drawn(noise):
                return own(given(output), x, t, **asked.options(**seen))
        extras["gradient"] = gradient.float()
    if draws and rng is None and noise is None:
        noise = torch.randn_like(x)

    source: dict[str, Any] = {"add_noise": False}
    if rows.noisy:
        source = {"rng": rng} if noise is None else drawn(noise, x)
    if hand_out:
        extras["x0_out"] = torch.empty_like(x)
    if not extras:
        steps = tables.get("steps", device, torch.float32)
        return {"sample": ops.reverse_step(x, prediction, steps, row, clip=clip, **source)}
    steps = tables.get("extended", device, torch.float32)
    sample = ops.extended_step(x, needed, steps, row, clip=clip, **source, **extras)
    return {"sample": sample, "pred_xstart": extras["x0_out"]} if hand_out else {"sample": sample}


def walk(
    peer: Guided,
    method: str,
    asked: Asked,
    shape: Sequence[int],
    noise: Tensor | None,
    device: Any,
    progress: bool,
    hand_out: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """A loop's steps by `method`, as the peer's progressive loops give them out."""
    if device is None:
        device = next(asked.model.parameters()).device  # type: ignore[attr-defined]
    assert isinstance(shape, tuple | list)
    x = noise
    if x is None:
        start = peer.accelerated.start()
        if start is None or torch.get_default_dtype() != torch.float32:
            x = torch.randn(*shape, device=device)
        else:
            x = randn(tuple(map(int, shape)), start, device=device)
    plan = peer._plan
    timesteps: Any = range(peer.num_timesteps)[::-1]
    if progress:
        from tqdm.auto import tqdm

        timesteps = tqdm(timesteps)
    # all steps' timesteps at once: the model gets a row of these, and no step makes a tensor, nor waits for one
    moments = torch.arange(peer.num_timesteps, device=device)[:, None].repeat(1, shape[0])
    told = moments
    if plan.why is None and not plan.tells_t:
        told = plan.told(moments.device)[:, None].repeat(1, shape[0])
    for at in timesteps:
        with torch.no_grad():
            t = moments[at]
            out = take(peer, method, asked, x, t, at, t if told is moments else told[at], hand_out)
            yield out
            x = out["sample"]
