"""What all accelerated classes share: the settings, and how an accelerated class and object are made of a peer's.

A peer is another library, or its class.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.ops.noise import STREAM_FORWARD, STREAM_START, Philox, random_seed, rng_of_many

__all__ = [
    "NOISES",
    "Accelerated",
    "Acceleration",
    "Support",
    "accelerated_copy",
    "make_class",
    "new",
    "overrides",
    "peer_class",
    "peer_method",
]

NOISES = ("torch", "philox")


class Support(NamedTuple):
    """A row of the table that `python -m ddpm_ext.integrations` prints.

    cls, method: of the peer. fused: the options that are fused. own: those that run the peer's own code.
    """

    cls: str
    method: str
    fused: str
    own: str


# ----------------------------------------------------------------------------------------------------------- settings


class Acceleration:
    """An accelerated object's settings, `obj.accelerated`.

    Attributes:
        noise: "torch", the peer's own draws, or "philox", those of the noise contract.
        rng: the ddpm_ext.Philox of "philox", else None. It may be replaced by another one without a draw or a stream
            of its own; setting anything else raises TypeError or ValueError.
        iteration: how often training noise was drawn by rng, which is the number of the next draw.
        fallbacks: {method: reason}, the latest reason why the peer's own code ran.
    """

    def __init__(self, noise: str = "torch", rng: Philox | None = None) -> None:
        self.noise = noise
        self.rng = rng
        self.iteration = 0
        self.fallbacks: dict[str, str] = {}
        self._warned: set[tuple[str, str]] = set()

    @classmethod
    def of(cls, noise: str, seed: int | None, sample_ids: int | Tensor) -> Acceleration:
        """The settings that accelerate's arguments describe, after a check of these."""
        checks.one_of("noise", noise, NOISES)
        if noise == "philox":
            return cls(noise, Philox(random_seed() if seed is None else seed, sample_ids))
        if seed is not None:
            raise ValueError(f"seed is {seed!r} beside noise 'torch', whose draws are the peer's: expected None")
        if isinstance(sample_ids, Tensor) or sample_ids != 0:
            raise ValueError(f"sample_ids is {sample_ids!r} beside noise 'torch', which has no sample ids: expected 0")
        return cls(noise)

    @property
    def rng(self) -> Philox | None:
        return self._rng

    @rng.setter
    def rng(self, rng: Philox | None) -> None:
        if (rng is None) != (self.noise == "torch"):
            raise ValueError(f"rng is {rng} beside noise {self.noise!r}, expected one beside 'philox' alone")
        self._rng = None if rng is None else rng_of_many(rng)

    def __repr__(self) -> str:
        given = {"noise": self.noise, "rng": self.rng, "fallbacks": self.fallbacks}
        return f"Acceleration({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def start(self) -> Philox | None:
        """The generator of the noise that a loop starts from; None where the peer draws it."""
        return None if self.rng is None else self.rng.of(STREAM_START, 0)

    def next_forward(self) -> Philox | None:
        """The generator of a training batch's noise, another draw at each call; None where the peer draws it."""
        if self.rng is None:
            return None
        draw, self.iteration = self.iteration, self.iteration + 1
        return self.rng.of(STREAM_FORWARD, draw)

    def record_fallback(self, library: str, method: str, reason: str) -> None:
        """Keeps why the peer's own code runs, and warns of it, once for each reason."""
        self.fallbacks[method] = reason
        if (method, reason) not in self._warned:
            self._warned.add((method, reason))
            noise = " and noise" if self.noise == "philox" else ""
            text = f"{method} runs the own code{noise} of {library}: {reason}"
            warnings.warn(text, stacklevel=_level_outside())


def _level_outside() -> int:
    """The stacklevel, seen from the caller, of the first frame that is neither this package's nor torch's."""
    if torch.compiler.is_compiling():  # the compiler does not trace frames
        return 1
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("ddpm_ext.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


# ------------------------------------------------------------------------------------------------------------ classes


class Accelerated:
    """The base of the mixins. A mixin comes before a peer's class in the bases of the accelerated class.

    Attributes:
        library: the peer's name, for warnings.
        replaces: the peer's methods that the mixin replaces.
        relies_on: the peer's methods whose work the fused ones do, too. A subclass of the peer's class that overrides
            any of the two is refused.
    """

    library: ClassVar[str]
    replaces: ClassVar[tuple[str, ...]]
    relies_on: ClassVar[tuple[str, ...]] = ()
    _peer: ClassVar[type]  # the class that this one is made of
    _restore: ClassVar[Callable[[type], Any]]  # of a peer's class: an accelerated object without state

    @property
    def accelerated(self) -> Acceleration:
        """The settings: see Acceleration."""
        found = self.__dict__.get("_acceleration")
        if found is None:  # the object was made by its class, not by accelerate
            found = self.__dict__["_acceleration"] = Acceleration()
        return found

    def _check(self) -> None:
        """Is called once for each new object. Raises TypeError where the object is not what its class promises."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles name the peer's class, which can be imported, and leave out what is only cached."""
        state = {name: value for name, value in self.__dict__.items() if name != "_fused_cache"}
        return type(self)._restore, (self._peer,), state


def peer_class(cls: type) -> type:
    """The peer's class that an accelerated class is made of; any other class itself."""
    return getattr(cls, "_peer", cls)


def peer_method(obj: Any, name: str) -> Callable[..., Any]:
    """The peer's own method of that name, bound to an accelerated object."""
    return getattr(super(Accelerated, obj), name)


def new(made: Any) -> Any:
    """An object without its state."""
    return made.__new__(made)


def accelerated_copy(obj: Any, made: type[Accelerated], settings: Acceleration) -> Any:
    """An object of the accelerated class `made` with the state of the peer's `obj`, which stays as it is.

    Raises TypeError where obj has attributes in place of its class's methods, or is not what the class promises.
    """
    for name in (*made.replaces, *made.relies_on):
        if name in vars(obj):
            raise TypeError(f"obj has a {name} of its own, expected its class's")
    accelerated = new(made)
    for name, value in vars(obj).items():  # containers are written to, so they are copied; tensors are replaced
        accelerated.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    accelerated.__dict__["_acceleration"] = settings
    accelerated.__dict__.pop("_fused_cache", None)
    accelerated._check()
    return accelerated


def overrides(mixin: type[Accelerated], peer: type, known: type) -> str | None:
    """The first of the methods that the mixin replaces or relies on which `peer`, a subclass of `known`, overrides."""
    for name in (*mixin.replaces, *mixin.relies_on):
        if getattr(peer, name, None) is not getattr(known, name, None):
            return name
    return None


@functools.cache
def make_class(mixin: type[Accelerated], peer: type, known: type, restore: Callable[[type], Any]) -> type:
    """The accelerated class of `peer`, which is `known` or a subclass of it.

    It has the peer's name, so that what the peer's library writes into files names a class of its own.

    Args:
        restore: a function that unpickling can import: of a peer's class, an accelerated object without state.

    Raises TypeError where a subclass overrides what is replaced, or what that relies on.
    """
    name = overrides(mixin, peer, known)
    if name is not None:
        raise TypeError(
            f"obj is a {peer.__module__}.{peer.__qualname__}, which has a {name} of its own, expected "
            f"{known.__qualname__}'s"
        )
    own = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_peer": peer, "_restore": staticmethod(restore)}
    return types.new_class(peer.__name__, (mixin, peer), exec_body=lambda namespace: namespace.update(own))
