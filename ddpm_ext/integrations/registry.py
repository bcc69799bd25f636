"""The classes of other libraries that accelerate() knows, and the accelerated class of each."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from ddpm_ext.integrations.shared import Support, make_class, new, overrides, peer_class

__all__ = ["KNOWN", "KnownClass", "accelerated_class", "support_table"]


class KnownClass(NamedTuple):
    """A peer's class, by its module and name, and the mixin for it, by the module in this package and name.

    Both are names, so that no library is imported before an object of it is accelerated.
    """

    module: str
    name: str
    mixin_module: str
    mixin: str


def _diffusers(module: str, name: str, mixin_module: str, mixin: str) -> KnownClass:
    return KnownClass(f"diffusers.schedulers.{module}", name, f"diffusers.{mixin_module}", mixin)


KNOWN = (
    _diffusers("scheduling_ddpm", "DDPMScheduler", "alphas", "DDPM"),
    _diffusers("scheduling_ddim", "DDIMScheduler", "alphas", "DDIM"),
    _diffusers("scheduling_ddim_inverse", "DDIMInverseScheduler", "alphas", "DDIMInverse"),
    *(
        KnownClass(f"{library}.{module}", name, "guided_diffusion", mixin)
        for library, module, name, mixin in (
            ("guided_diffusion", "gaussian_diffusion", "GaussianDiffusion", "Guided"),
            ("guided_diffusion", "respace", "SpacedDiffusion", "Spaced"),
            ("improved_diffusion", "gaussian_diffusion", "GaussianDiffusion", "Improved"),
            ("improved_diffusion", "respace", "SpacedDiffusion", "ImprovedSpaced"),
        )
    ),
    KnownClass(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
        "GaussianDiffusion",
        "denoising_diffusion_pytorch",
        "Denoising",
    ),
)


class Recognised(NamedTuple):
    """A mixin for classes of any name: its module, its name, and the module's function that tests a class."""

    mixin_module: str
    mixin: str
    test: str


# A class that is not in KNOWN is tested by each of these in turn.
RECOGNISED = (
    Recognised("diffusers.traced", "Traced", "is_scheduler"),
    Recognised("tutorial", "Tutorial", "resembles"),
)


def _integration(name: str) -> Any:
    return importlib.import_module(f"ddpm_ext.integrations.{name}")


def support_table() -> list[Support]:
    """What is fused and what is not, method by method."""
    modules = dict.fromkeys([*(known.mixin_module for known in KNOWN), *(entry.mixin_module for entry in RECOGNISED)])
    return [row for module in modules for row in _integration(module).SUPPORT]


def accelerated_class(peer: type) -> type:
    """The accelerated subclass of a peer's class; diffusers' schedulers can be made by it directly.

    Raises:
        TypeError: the class is not a known one, or it is a subclass that overrides what is replaced.
    """
    peer = peer_class(peer)
    for ancestor in peer.__mro__:
        for known in KNOWN:
            if (ancestor.__module__, ancestor.__name__) == (known.module, known.name):
                mixin = getattr(_integration(known.mixin_module), known.mixin)
                if known.module.startswith("diffusers.") and overrides(mixin, peer, ancestor):
                    break  # a scheduler of its own, which is traced
                return make_class(mixin, peer, ancestor, _restore)
    for entry in RECOGNISED:
        module = _integration(entry.mixin_module)
        if getattr(module, entry.test)(peer):
            return make_class(getattr(module, entry.mixin), peer, peer, _restore)
    raise TypeError(f"obj is a {peer.__module__}.{peer.__qualname__}, expected {_expected()}")


def _restore(peer: type) -> Any:
    """What pickle calls: an accelerated object without its state."""
    return new(accelerated_class(peer))


def _expected() -> str:
    by_library: dict[str, list[str]] = {}
    for known in KNOWN:
        by_library.setdefault(known.module.partition(".")[0], []).append(known.name)
    names = "; ".join(f"{library}'s {', '.join(names)}" for library, names in by_library.items())
    return f"{names}; a pipeline of diffusers; or a class with the tutorial's p_sample, q_sample and tables"
