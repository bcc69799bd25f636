"""training_losses of an accelerated object: a launch for x_t, one for the error and one for the variational bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.guided_diffusion.peer import Function, Peer, maps_timesteps
from ddpm_ext.integrations.guided_diffusion.steps import check_inputs, returning, split_output
from ddpm_ext.integrations.guided_diffusion.tables import LOSSES, FusedTables, tables_of
from ddpm_ext.integrations.shared import peer_method
from ddpm_ext.integrations.tensors import wants_gradient

__all__ = ["training_losses"]


def training_losses(
    peer: Peer,
    model: Function,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None,
    noise: Tensor | None,
) -> dict[str, Tensor]:
    """The peer's training_losses. Raises Fallback where they have no fused form."""
    tables, loss = tables_of(peer), getattr(peer.loss_type, "name", "")
    check_inputs(tables, x_start, t, noise)
    if loss not in LOSSES or x_start.dim() < 2:
        raise Fallback
    if wants_gradient(x_start, noise):
        raise Fallback("a gradient is asked for by x_start or noise")

    with_error = LOSSES[loss][0]
    with_bound = tables.learned or not with_error
    # The samples whose term the peer computes. Finding them waits for a GPU, as the peer does for each of its tables.
    at_zero = (t == 0).nonzero()[:, 0] if with_bound else t
    source: dict[str, Any] = {"noise": noise}
    if noise is None:
        rng = peer.accelerated.next_forward(x_start.device)
        source = {"noise": torch.randn_like(x_start)} if rng is None else {"rng": rng}
    x_t = ops.forward_process(x_start, tables.q_sample(x_start.device), t, **source)
    as_they_are = tables.model_gets_t or maps_timesteps(peer, tables, model)
    output = model(x_t, t if as_they_are else tables.model_timesteps(t.device)[t], **(model_kwargs or {}))

    def own_losses() -> Any:
        own = peer_method(peer, "training_losses")
        return own(returning(output), x_start, t, model_kwargs, _noise(tables, x_start, t, source))

    parts = split_output(tables, x_start, output, own_losses)
    terms: dict[str, Tensor] = {}
    if with_bound:
        bound = tables.bound(loss)
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
        if len(at_zero) > 0:
            own_output = _with_prediction_detached(output, x_start.shape[1]) if with_error else output
            inputs = (x_start[at_zero], x_t[at_zero], t[at_zero])
            own_model = returning(own_output[at_zero])
            own_terms = peer._vb_terms_bpd(own_model, *inputs, clip_denoised=False)["output"]
            terms["vb"] = terms["vb"].index_add(0, at_zero, (own_terms * bound.factor).to(terms["vb"].dtype))
    if not with_error:
        return {"loss": terms["vb"]}
    target = None if tables.prediction == "eps" else x_start
    terms["mse"] = ops.diffusion_loss(parts[0], target, tables.error(x_start.device), t, reduction="none", **source)
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms


def _noise(tables: FusedTables, x_start: Tensor, t: Tensor, source: dict[str, Any]) -> Tensor:
    """The noise itself, which the launches may have made without storing it."""
    if source.get("noise") is None:
        return ops.forward_process(torch.zeros_like(x_start), tables.noise(x_start.device), t, **source)
    return source["noise"]


def _with_prediction_detached(output: Tensor, channels: int) -> Tensor:
    """The output with a prediction that gets no gradient from the bound."""
    return torch.cat([output[:, :channels].detach(), output[:, channels:]], 1)
