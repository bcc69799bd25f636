"""What all accelerated classes share: how one is made of a peer's class, its settings, and which tensors fit."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.ops.noise import STREAM_FORWARD, STREAM_START, Philox, random_seed, rng_of_many

__all__ = [
    "NOISES",
    "TRANSFORMED",
    "Accelerated",
    "Acceleration",
    "Support",
    "check_tensors",
    "dtype_name",
    "is_like",
    "is_plain_tensor",
    "make_class",
    "new",
    "noise_arguments",
    "version",
    "wants_gradient",
]

NOISES = ("torch", "philox")
TRANSFORMED = "a transform of torch.func is at work"


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

    def check_accelerated(self) -> None:
        """Is called once for each new object. Raises TypeError where the object is not what its class promises."""

    def peer_method(self, name: str) -> Callable[..., Any]:
        """The peer's own method of that name, bound to this object."""
        return getattr(super(), name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles name the peer's class, which can be imported, and leave out what is only cached."""
        state = {name: value for name, value in self.__dict__.items() if name != "_fused_cache"}
        return type(self)._restore, (self._peer,), state


def new(made: Any) -> Any:
    """An object without its state."""
    return made.__new__(made)


@functools.cache
def make_class(mixin: type[Accelerated], peer: type, known: type, restore: Callable[[type], Any]) -> type:
    """The accelerated class of `peer`, which is `known` or a subclass of it.

    It has the peer's name, so that what the peer's library writes into files names a class of its own.

    Args:
        restore: a function that unpickling can import: of a peer's class, an accelerated object without state.

    Raises TypeError where a subclass overrides what is replaced, or what that relies on.
    """
    for name in (*mixin.replaces, *mixin.relies_on):
        if getattr(peer, name, None) is not getattr(known, name, None):
            raise TypeError(
                f"obj is a {peer.__module__}.{peer.__qualname__}, which has a {name} of its own, expected "
                f"{known.__qualname__}'s"
            )
    own = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_peer": peer, "_restore": staticmethod(restore)}
    return types.new_class(peer.__name__, (mixin, peer), exec_body=lambda namespace: namespace.update(own))


# ------------------------------------------------------------------------------------------------------------ tensors


def is_plain_tensor(x: Any) -> bool:
    """Whether x is a tensor, of no subclass and outside of function transforms; a compiler sees those itself."""
    return type(x) is Tensor and (torch.compiler.is_compiling() or checks.is_plain(x))


def is_like(y: Any, x: Tensor) -> bool:
    """Whether y is a plain tensor of x's shape, on x's device."""
    return is_plain_tensor(y) and y.shape == x.shape and y.device == x.device


def check_tensors(x: Tensor, *others: Tensor | None) -> None:
    """Raises Fallback where the fused operators can't take x and the others, which are to have its shape."""
    if not torch.compiler.is_compiling():
        for y in (x, *others):
            if type(y) is Tensor and not checks.is_plain(y):
                raise Fallback(TRANSFORMED)
    if type(x) is not Tensor or not (x.is_cpu or x.is_cuda):
        raise Fallback("its samples are no plain tensors on a CPU or a CUDA device")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Fallback(f"its samples are {dtype_name(x.dtype)}")
    if x.dim() == 0:
        raise Fallback("its samples have no batch dimension")
    for y in others:
        if y is None:
            continue
        if type(y) is not Tensor or y.device != x.device:
            raise Fallback("its tensors are not all plain ones on one device")
        if y.shape != x.shape:
            raise Fallback("its tensors have different shapes")


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


_DRAWS = torch.randn, torch.randn_like


def noise_arguments(noise: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The operators' arguments for noise that was just drawn for a step of samples x.

    The next sample overwrites the noise, so that a step needs no more memory than one without noise; but not where
    somebody has replaced torch's functions and may keep what they drew.
    """
    unpatched = (torch.randn, torch.randn_like) == _DRAWS and torch._C._len_torch_function_stack() == 0
    if unpatched and x.is_contiguous() and noise.is_contiguous():
        return {"noise": noise, "out": noise}
    return {"noise": noise}


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient is recorded and any of the tensors requires one."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def version(x: Tensor) -> tuple[int, int]:
    """A key that changes when x becomes another tensor or is written to; inference tensors count no versions."""
    return id(x), 0 if x.is_inference() else x._version
