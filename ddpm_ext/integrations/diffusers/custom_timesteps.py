"""Timesteps of one's own for diffusers' UniPCMultistepScheduler, whose set_timesteps takes none."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

UNIPC = "UniPCMultistepScheduler"
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


def with_timesteps(cls: type, own: Callable[..., Any]) -> Callable[..., Any]:
    """set_timesteps with DPMSolverMultistepScheduler's argument `timesteps`, where cls is a UniPC without.

    own: set_timesteps of an accelerated class of cls.
    """
    signature = inspect.signature(own)
    if "timesteps" in signature.parameters or UNIPC not in [base.__name__ for base in cls.__mro__]:
        return own
    added = inspect.Parameter("timesteps", inspect.Parameter.KEYWORD_ONLY, default=None)

    @functools.wraps(own)
    def set_timesteps(self: Any, *args: Any, timesteps: Any = None, **kwargs: Any) -> None:
        if timesteps is None:
            own(self, *args, **kwargs)
            return
        given = signature.bind_partial(self, *args, **kwargs).arguments
        others = [name for name, value in given.items() if name not in ("self", "device") and value is not None]
        others += [name for name in SPACINGS if getattr(self.config, name, False)]
        others += [] if getattr(self, "solver_p", None) is None else ["solver_p"]
        if others:
            raise ValueError(f"timesteps are given beside {others[0]}, expected one of them")
        whole = torch.as_tensor(timesteps, device="cpu")
        count = len(self.alphas_cumprod)
        falls = whole.dim() == 1 and len(whole) > 0 and not whole.is_floating_point() and bool((whole.diff() < 0).all())
        if not falls or whole[0] >= count or whole[-1] < 0:
            raise ValueError(f"timesteps are {timesteps}, expected whole numbers that fall, from {count - 1} to 0")
        own(self, len(whole), given.get("device"))
        levels = self.alphas_cumprod.cpu()[whole]
        self.sigmas = torch.cat([((1 - levels) / levels).sqrt().to(self.sigmas.dtype), self.sigmas[-1:]])
        self.timesteps = whole.to(self.timesteps)

    parameters = [*signature.parameters.values(), added]
    set_timesteps.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return set_timesteps
