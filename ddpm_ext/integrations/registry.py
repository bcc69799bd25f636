"""The classes of other libraries that accelerate() knows, and the accelerated class of each."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from ddpm_ext.integrations.library_code import foreign_method, library_class
from ddpm_ext.integrations.shared import Support, make_class, new, peer_class


class KnownClass(NamedTuple):
    """A class of another library, and the mixin for it in this package.

    Attributes:
        module, name: the module and name of the library's class. It is not imported before an object of the library is
            accelerated.
        mixin_module, mixin: the module and name of the mixin. The module's path is relative to this package.
    """

    module: str
    name: str
    mixin_module: str
    mixin: str


def _diffusers(module: str, name: str, mixin_module: str, mixin: str) -> KnownClass:
    return KnownClass(f"diffusers.schedulers.{module}", name, f"diffusers.{mixin_module}", mixin)


_LUCIDRAINS = "denoising_diffusion_pytorch"
KNOWN = (
    _diffusers("scheduling_ddpm", "DDPMScheduler", "alphas", "DDPM"),
    _diffusers("scheduling_ddpm_parallel", "DDPMParallelScheduler", "alphas", "DDPM"),
    _diffusers("scheduling_ddim", "DDIMScheduler", "alphas", "DDIM"),
    _diffusers("scheduling_ddim_parallel", "DDIMParallelScheduler", "alphas", "DDIM"),
    KnownClass("guided_diffusion.gaussian_diffusion", "GaussianDiffusion", "guided_diffusion", "Guided"),
    KnownClass("guided_diffusion.respace", "SpacedDiffusion", "guided_diffusion", "Spaced"),
    KnownClass("improved_diffusion.gaussian_diffusion", "GaussianDiffusion", "guided_diffusion", "Improved"),
    KnownClass("improved_diffusion.respace", "SpacedDiffusion", "guided_diffusion", "ImprovedSpaced"),
    KnownClass(f"{_LUCIDRAINS}.{_LUCIDRAINS}", "GaussianDiffusion", _LUCIDRAINS, "Denoising"),
)
# (module, mixin, the module's function that says whether the mixin is for a class), for classes that get no mixin of
# KNOWN. The functions are tried in this order.
RECOGNISED = (("diffusers.traced", "TracedScheduler", "is_scheduler"), ("tutorial", "Tutorial", "resembles"))


def _integration(name: str) -> Any:
    return importlib.import_module(f"ddpm_ext.integrations.{name}")


def support_table() -> list[Support]:
    """A row for each method: which of its options are fused, and which run the library's code."""
    modules = dict.fromkeys([*(known.mixin_module for known in KNOWN), *(module for module, _, _ in RECOGNISED)])
    return [row for module in modules for row in _integration(module).SUPPORT]


def accelerated_class(peer: type) -> type:
    """The accelerated subclass of a library's class. For diffusers' schedulers it can be instantiated directly.

    Raises:
        TypeError: the class is of no kind that can be accelerated, or its library is a version or fork that can't be.
    """
    peer = peer_class(peer)
    names = {(known.module, known.name): known for known in KNOWN}
    for ancestor in peer.__mro__:
        known = names.get((ancestor.__module__, ancestor.__name__))
        if known is not None:
            mixin = getattr(_integration(known.mixin_module), known.mixin)
            is_scheduler = known.module.startswith("diffusers.")
            # diffusers' own subclasses of a scheduler, and users' that override methods, get TracedScheduler, below.
            if not is_scheduler or (library_class(peer) is ancestor and foreign_method(peer, {}) is None):
                return make_class(mixin, peer, ancestor, _restore)
    for name, mixin, test in RECOGNISED:
        module = _integration(name)
        if getattr(module, test)(peer):
            return make_class(getattr(module, mixin), peer, peer, _restore)
    libraries: dict[str, list[str]] = {}
    for known in KNOWN:
        libraries.setdefault(known.module.partition(".")[0], []).append(known.name)
    del libraries["diffusers"]  # the message names them all as "any scheduler"
    others = "; ".join(f"a {' or '.join(classes)} of {library}" for library, classes in libraries.items())
    raise TypeError(
        f"obj is a {peer.__module__}.{peer.__qualname__}, expected any scheduler or pipeline of diffusers; {others}; "
        "or a class with the tutorial's p_sample, q_sample and tables"
    )


def _restore(peer: type) -> Any:
    """An accelerated object without attributes, for pickle."""
    return new(accelerated_class(peer))
