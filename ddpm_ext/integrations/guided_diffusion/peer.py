"""What the steps, loops and losses need of an accelerated object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ddpm_ext.integrations.guided_diffusion.tables import FusedTables
from ddpm_ext.integrations.shared import Acceleration

__all__ = ["Function", "Peer"]

Function = Callable[..., Any]


class Peer(Protocol):
    """An accelerated GaussianDiffusion of guided-diffusion or improved-diffusion."""

    num_timesteps: int
    loss_type: Any

    @property
    def accelerated(self) -> Acceleration: ...

    def peer_method(self, name: str) -> Function:
        """The library's own method of that name."""

    def fused_tables(self) -> FusedTables:
        """The tables of the object as it is. Raises Fallback where the library's own code has to run."""

    def maps_timesteps(self, model: Function) -> bool:
        """Whether a model maps timesteps itself, so that it gets them as they are."""
