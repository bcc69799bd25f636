"""What the steps, loops and losses need of an accelerated object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.guided_diffusion.tables import FusedTables

__all__ = ["Function", "Peer", "maps_timesteps"]

Function = Callable[..., Any]


class Peer(Protocol):
    """An accelerated GaussianDiffusion of guided-diffusion or improved-diffusion."""

    num_timesteps: int
    loss_type: Any

    @property
    def accelerated(self) -> Acceleration: ...

    _vb_terms_bpd: Function


def maps_timesteps(peer: Any, tables: FusedTables, model: Function) -> bool:
    """Whether a model maps timesteps itself, so that it gets them as they are."""
    return tables.spaced and peer._wrap_model(model) is model
