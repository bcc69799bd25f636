"""What all accelerated classes share: how one is made of a peer's, whose noise it takes, and when it steps aside."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.ops.noise import STREAM_FORWARD, STREAM_START, Philox, random_seed, rng_of_many

__all__ = ["NOISES", "Accelerated", "Acceleration", "drawn", "make_class", "misfit", "new", "version", "wants_gradient"]

NOISES = ("torch", "philox")


class Acceleration:
    """An accelerated object's settings, `obj.accelerated`.

    Attributes:
        noise: "torch", the peer's own draws, or "philox", those of the noise contract.
        rng: the ddpm_ext.Philox of the latter, in whose place another may be set, without a draw or a stream of its
            own; else None. Raises TypeError and ValueError.
        iteration: how often training noise was drawn by it: the draw of the next.
        fallbacks: {method: why the peer's own code ran}, the latest of each.
    """

    def __init__(self, noise: str = "torch", rng: Philox | None = None) -> None:
        self.noise = noise
        self.rng = rng
        self.iteration = 0
        self.fallbacks: dict[str, str] = {}
        self._said: set[tuple[str, str]] = set()

    @classmethod
    def of(cls, noise: str, seed: int | None, sample_ids: int | Tensor) -> Acceleration:
        """accelerate's arguments, checked."""
        checks.one_of("noise", noise, NOISES)
        if noise == "philox":
            return cls(noise, Philox(random_seed() if seed is None else seed, sample_ids))
        if seed is not None:
            raise ValueError(f"seed is {seed!r} beside noise 'torch', whose draws are the peer's: expected None")
        if isinstance(sample_ids, Tensor) or sample_ids != 0:
            raise ValueError(f"sample_ids is {sample_ids!r} beside noise 'torch', which knows none: expected 0")
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
        """Of the noise that a loop starts from; None: the peer's own."""
        return None if self.rng is None else self.rng.of(STREAM_START, 0)

    def next_forward(self) -> Philox | None:
        """Of a training batch's noise, another one each time; None: the peer's own."""
        if self.rng is None:
            return None
        draw, self.iteration = self.iteration, self.iteration + 1
        return self.rng.of(STREAM_FORWARD, draw)

    def steps_aside(self, library: str, method: str, why: str) -> None:
        """The peer's own code is about to run: says so once a reason."""
        self.fallbacks[method] = why
        if (method, why) not in self._said:
            self._said.add((method, why))
            noise = " and noise" if self.noise == "philox" else ""
            text = f"{method} runs the own code{noise} of {library}: {why}"
            warnings.warn(text, stacklevel=_outside())


def _outside() -> int:
    """How many frames above its caller's the first one is that is neither ours nor torch's."""
    if torch.compiler.is_compiling():  # which knows no frames
        return 1
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("ddpm_ext.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


class Accelerated:
    """Stands before a peer's class in an accelerated one's bases: its methods are the fused ones, super()'s the peer's.

    `replaces` and `relies_on` name methods of the peer: a subclass that has others of its own is refused.
    """

    library: ClassVar[str]
    replaces: ClassVar[tuple[str, ...]]
    relies_on: ClassVar[tuple[str, ...]] = ()
    _peer: ClassVar[type]  # the class that this is made of

    @property
    def accelerated(self) -> Acceleration:
        """How this is accelerated: see Acceleration."""
        found = self.__dict__.get("_acceleration")
        if found is None:  # of an object that was made by its class, not by accelerate
            found = self.__dict__["_acceleration"] = Acceleration()
        return found

    def _check(self) -> None:
        """Of a new object, before it is handed out: raises TypeError where it is not what its class says."""

    def _aside(self, method: str, why: str | None) -> Any:
        """None; the peer's own code is about to run, without a reason to tell where that is to refuse an argument."""
        if why is not None:
            self.accelerated.steps_aside(self.library, method, why)
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By the peer's class, since a name leads to that one; without what is made anew where it is missing."""
        state = {name: value for name, value in self.__dict__.items() if name != "_plans"}
        return _blank, (self._peer,), state


def _blank(peer: type) -> Any:
    from ddpm_ext.integrations import accelerated_class

    return new(accelerated_class(peer))


def new(made: Any) -> Any:
    """An object without its state."""
    return made.__new__(made)


@functools.cache
def make_class(mixin: type[Accelerated], peer: type, known: type) -> type:
    """The accelerated class of `peer`, which is `known` or a subclass of it; it has the peer's name, so that what the
    peer's library writes into files names a class of its own.

    Raises TypeError where a subclass has its own of what is replaced, or of what that stands for.
    """
    for name in (*mixin.replaces, *mixin.relies_on):
        if getattr(peer, name, None) is not getattr(known, name, None):
            raise TypeError(
                f"obj is a {peer.__module__}.{peer.__qualname__}, which has a {name} of its own, expected "
                f"{known.__qualname__}'s"
            )
    own = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(peer.__name__, (mixin, peer), exec_body=lambda namespace: namespace.update(own, _peer=peer))


def misfit(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the fused operators can't take x and others of its shape, or None: they can."""
    plain = torch.compiler.is_compiling() or all(checks.is_plain(y) for y in (x, *others) if type(y) is Tensor)
    if not plain:
        return "a transform of torch.func is at work"
    if type(x) is not Tensor or not (x.is_cpu or x.is_cuda):
        return "its samples are no plain tensors on a CPU or a CUDA device"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its samples are {str(x.dtype).removeprefix('torch.')}"
    if x.dim() == 0:
        return "its samples have no batch dimension"
    for y in others:
        if y is None:
            continue
        if type(y) is not Tensor or y.device != x.device:
            return "its tensors are not all plain ones on one device"
        if y.shape != x.shape:
            return "its tensors have different shapes"
    return None


_DRAWS = torch.randn, torch.randn_like


def drawn(noise: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Noise that was just drawn for a step of samples x, as the operators take it: the next sample goes where it lies,
    so that a step needs no more memory than one without noise. Unless somebody drew for torch, and may keep it."""
    ours = (torch.randn, torch.randn_like) == _DRAWS and torch._C._len_torch_function_stack() == 0
    if ours and x.is_contiguous() and noise.is_contiguous():
        return {"noise": noise, "out": noise}
    return {"noise": noise}


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def version(x: Tensor) -> tuple[int, int]:
    """Changes when x becomes another tensor or is written to; inference tensors count no versions."""
    return id(x), 0 if x.is_inference() else x._version
