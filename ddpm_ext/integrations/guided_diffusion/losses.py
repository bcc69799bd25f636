"""training_losses of an accelerated object: a launch for x_t, one for the error and one for the variational bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.guided_diffusion.plan import LOSSES, Plan
from ddpm_ext.integrations.guided_diffusion.steps import Function, given, halves, why_not
from ddpm_ext.integrations.shared import wants_gradient

if TYPE_CHECKING:
    from ddpm_ext.integrations.guided_diffusion.classes import Guided

__all__ = ["training_losses"]


def training_losses(
    peer: Guided,
    model: Function,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None,
    noise: Tensor | None,
) -> dict[str, Tensor]:
    own: Function = peer._own("training_losses")
    plan, loss = peer._plan, getattr(peer.loss_type, "name", "")
    why = why_not(plan, x_start, t, noise)
    if why is None and (loss not in LOSSES or x_start.dim() < 2):
        why = ""
    if why is None and wants_gradient(x_start, noise):
        why = "a gradient is asked for by x_start or noise"
    if why is not None:
        peer._aside("training_losses", why or None)
        return own(model, x_start, t, model_kwargs, noise)

    with_error = LOSSES[loss][0]
    with_bound = plan.learned or not with_error
    # samples whose term is the peer's; to find them waits for a GPU, as the peer does for each of its tables
    bins = (t == 0).nonzero()[:, 0] if with_bound else t
    source: dict[str, Any] = {"noise": noise}
    if noise is None:
        rng = peer.accelerated.next_forward()
        source = {"noise": torch.randn_like(x_start)} if rng is None else {"rng": rng}
    x_t = ops.forward_process(x_start, plan.q_sample(x_start.device), t, **source)
    told = t if plan.tells_t or peer._maps(model) else plan.told(t.device)[t]
    output = model(x_t, told, **(model_kwargs or {}))

    parts = halves(plan, x_start, output)
    if isinstance(parts, str):
        peer._aside("training_losses", parts or None)
        return own(given(output), x_start, t, model_kwargs, _noise(plan, x_start, t, source))
    terms: dict[str, Tensor] = {}
    if with_bound:
        bound = plan.bound(loss)
        terms["vb"] = ops.diffusion_loss(
            output,
            x_start,
            bound.tables.get("bound", x_start.device, torch.float32),
            t,
            reduction="none",
            variational=True,
            detach_mean=with_error,
            **source,
        )
        if len(bins) > 0:
            their_output = _detached(output, x_start.shape[1]) if with_error else output
            at_bins = (x_start[bins], x_t[bins], t[bins])
            own_terms = peer._vb_terms_bpd(given(their_output[bins]), *at_bins, clip_denoised=False)["output"]
            terms["vb"] = terms["vb"].index_add(0, bins, (own_terms * bound.factor).to(terms["vb"].dtype))
    if not with_error:
        return {"loss": terms["vb"]}
    target = None if plan.prediction == "eps" else x_start
    terms["mse"] = ops.diffusion_loss(parts[0], target, plan.error(x_start.device), t, reduction="none", **source)
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms


def _noise(plan: Plan, x_start: Tensor, t: Tensor, source: dict[str, Any]) -> Tensor:
    """The noise itself, where it was not made yet."""
    if source.get("noise") is None:
        table = plan.forward.tables.get("noise", x_start.device, torch.float32)
        return ops.forward_process(torch.zeros_like(x_start), table, t, **source)
    return source["noise"]


def _detached(output: Tensor, channels: int) -> Tensor:
    """With a prediction that the bound is not to move."""
    return torch.cat([output[:, :channels].detach(), output[:, channels:]], 1)
