"""Accelerated, the base of all accelerated classes, and the functions that create an accelerated class or object.

"The library" is the other library whose object is accelerated. In names, `peer` means its class or its code.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from ddpm_ext.integrations.acceleration import Acceleration

# Attributes that copies and pickles leave out: caches, and the results of proofs in the object's loops.
CACHED = (
    "_changing_loops", "_fused_cache", "_host_timesteps", "_latest_rows", "_left_alone", "_next_input", "_user_loop",
    "_user_rows", "_stored",
)  # fmt: skip


class Support(NamedTuple):
    """A row of the table that `python -m ddpm_ext.integrations` prints.

    Attributes:
        cls, method: the library's class and method.
        fused: the calls of the method that are fused, in words.
        unfused: the calls that run the library's code, in words.
    """

    cls: str
    method: str
    fused: str
    unfused: str


# ------------------------------------------------------------------------------------------------------------ classes


class Accelerated:
    """The base of the mixins. An accelerated class is derived from a mixin and, after it, from the library's class.

    Attributes:
        library: the library's name, for warnings.
        replaces: the names of the library's methods that the mixin replaces.
        relies_on: the names of the library's methods that the replaced methods call, and whose work the fused code also
            does. If a user has overridden a method of `replaces` or `relies_on`, the user's code runs. With trace=True,
            proven rows replace an overridden step.
    """

    library: ClassVar[str]
    replaces: ClassVar[tuple[str, ...]]
    relies_on: ClassVar[tuple[str, ...]] = ()
    _peer: ClassVar[type]  # the class of the original object: the library's class, or a user's subclass of it
    _known: ClassVar[type]  # the library's class, for which the mixin was written: `_peer` or a base of it
    _restore: ClassVar[Callable[[type], Any]]  # _restore(_peer) returns an accelerated object without attributes

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
        """Raises TypeError for an object that the mixin can't accelerate. accelerated_copy calls it."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the attributes, without caches, and the original class `_peer`.

        Pickle can't import the accelerated class: `_restore` makes it from `_peer`. The settings are copied, so that
        loops of a copy and of the original are counted separately.
        """
        state = {name: value for name, value in self.__dict__.items() if name not in CACHED}
        if "_acceleration" in state:
            state["_acceleration"] = copy.copy(state["_acceleration"])
        return type(self)._restore, (self._peer,), state  # noqa: SLF001 (of this module)


def shown(obj: Any) -> str:
    """A line with the accelerated class, its noise, and its fused calls and fallbacks so far."""
    return f"# {type(obj).__name__}, accelerated by ddpm_ext: {obj.accelerated.summary()}"


def peer_class(cls: type) -> type:
    """The original class of an accelerated class. Any other class is returned as it is."""
    return getattr(cls, "_peer", cls)


def peer_method(obj: Any, name: str) -> Callable[..., Any]:
    """The method of this name of the original class, bound to an accelerated object."""
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
    """An object of the accelerated class `cls` with the attributes of the library's object `obj`, which is not changed.

    Raises TypeError if obj has an attribute in place of a method that the mixin replaces, or if the mixin can't
    accelerate obj.
    """
    for name in cls.replaces:
        if name in vars(obj):
            raise TypeError(f"obj has a {name} of its own, expected its class's")
    accelerated = new(cls)
    # Containers are copied, because methods write to them. Tensors are shared, because methods only replace them.
    for name, value in vars(obj).items():
        if name not in CACHED:
            accelerated.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    accelerated.__dict__["_acceleration"] = settings
    accelerated._check()  # noqa: SLF001 (of this module)
    return accelerated


@functools.cache
def make_class(mixin: type[Accelerated], peer: type, known: type, restore: Callable[[type], Any]) -> type:
    """The accelerated class for objects of the class `peer`.

    It has the name of `peer`, so that files that the library writes name a class of the library.

    Args:
        known: the library's class for which the mixin was written, `peer` or a base of it.
        restore: restore(peer) returns an accelerated object without attributes. Pickles import this function.
    """
    attributes = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes |= {"_peer": peer, "_known": known, "_restore": staticmethod(restore)}
    return types.new_class(peer.__name__, (mixin, peer), exec_body=lambda namespace: namespace.update(attributes))
