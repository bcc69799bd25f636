"""The base of all accelerated classes, and the functions that create an accelerated class or object.

A peer is another library, or a class of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from ddpm_ext.integrations.acceleration import Acceleration

# Attributes that copies and pickles leave out, because they are caches.
CACHED = (
    "_changing_loops", "_fused_cache", "_host_timesteps", "_latest_rows", "_left_alone", "_next_input", "_user_loop",
    "_user_rows", "_stored",
)  # fmt: skip


class Support(NamedTuple):
    """A row of the table that `python -m ddpm_ext.integrations` prints.

    Attributes:
        cls, method: the peer's class and method.
        fused: the options that are fused.
        own: the options with which the peer's code runs.
    """

    cls: str
    method: str
    fused: str
    own: str


# ------------------------------------------------------------------------------------------------------------ classes


class Accelerated:
    """The base of the mixins. A mixin comes before a peer's class in the bases of the accelerated class.

    Attributes:
        library: the peer's name, for warnings.
        replaces: the peer's methods that the mixin replaces.
        relies_on: the peer's methods that the replaced methods call, and whose work the fused code also does. If a user
            has overridden a method of `replaces` or `relies_on`, the object's code runs and not the fused code.
    """

    library: ClassVar[str]
    replaces: ClassVar[tuple[str, ...]]
    relies_on: ClassVar[tuple[str, ...]] = ()
    _peer: ClassVar[type]  # the peer's class, which may be a user's subclass of a library's class
    _known: ClassVar[type]  # the library's class: `_peer`, or the base of it for which the mixin was written
    _restore: ClassVar[Callable[[type], Any]]  # (peer's class) -> an accelerated object without attributes

    @property
    def accelerated(self) -> Acceleration:
        """The settings: see Acceleration."""
        settings = self.__dict__.get("_acceleration")
        if settings is None:  # the object was created by its class, not by accelerate
            settings = self.__dict__["_acceleration"] = Acceleration()
        return settings

    def __repr__(self) -> str:
        return f"{shown(self)}\n{super().__repr__()}"

    def _check(self) -> None:
        """Called once for each new object. Raises TypeError for an object that its mixin can't accelerate."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the peer's class, which can be imported, and the state without caches.

        A copy has its own settings, so that its loops and those of the original are counted separately.
        """
        state = {name: value for name, value in self.__dict__.items() if name not in CACHED}
        if "_acceleration" in state:
            state["_acceleration"] = copy.copy(state["_acceleration"])
        return type(self)._restore, (self._peer,), state  # noqa: SLF001 (of this module)


def shown(obj: Any) -> str:
    """A line with the accelerated class, its noise, and its fused calls and fallbacks so far."""
    return f"# {type(obj).__name__}, accelerated by ddpm_ext: {obj.accelerated.summary()}"


def peer_class(cls: type) -> type:
    """The peer's class of an accelerated class. Any other class is returned as it is."""
    return getattr(cls, "_peer", cls)


def peer_method(obj: Any, name: str) -> Callable[..., Any]:
    """The peer's method of that name, bound to an accelerated object."""
    return getattr(super(Accelerated, obj), name)


def signature_text(function: Any) -> str:
    """The signature without annotations, such as "(self, x, noise=None)"."""
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def new(cls: Any) -> Any:
    """Creates an object without attributes: __init__ is not called."""
    return cls.__new__(cls)


def accelerated_copy(obj: Any, cls: type[Accelerated], settings: Acceleration) -> Any:
    """An object of the accelerated class `cls` with the state of the peer's `obj`, which is not changed.

    Raises TypeError if obj has attributes in place of its class's methods, or if the mixin can't accelerate it.
    """
    for name in cls.replaces:
        if name in vars(obj):
            raise TypeError(f"obj has a {name} of its own, expected its class's")
    accelerated = new(cls)
    # Containers are copied because methods write to them. Tensors are shared: methods only assign new ones.
    for name, value in vars(obj).items():
        if name not in CACHED:
            accelerated.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    accelerated.__dict__["_acceleration"] = settings
    accelerated._check()  # noqa: SLF001 (of this module)
    return accelerated


@functools.cache
def make_class(mixin: type[Accelerated], peer: type, known: type, restore: Callable[[type], Any]) -> type:
    """The accelerated class of `peer`, which is `known` or a subclass of it.

    It has the peer's name, so that files that the library writes name the library's class.

    Args:
        restore: (peer's class) -> an accelerated object without attributes. Pickles import this function.
    """
    attributes = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes |= {"_peer": peer, "_known": known, "_restore": staticmethod(restore)}
    return types.new_class(peer.__name__, (mixin, peer), exec_body=lambda namespace: namespace.update(attributes))
