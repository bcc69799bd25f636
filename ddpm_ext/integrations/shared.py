"""What all accelerated classes share: how an accelerated class and object are made of a peer's.

A peer is another library, or its class.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from ddpm_ext.integrations.acceleration import Acceleration

# Attributes that no copy and no pickle has.
CACHED = (
    "_changing_loops", "_fused_cache", "_host_timesteps", "_latest_rows", "_left_alone", "_next_input", "_own_loop",
    "_own_rows", "_stored",
)  # fmt: skip


class Support(NamedTuple):
    """A row of the table that `python -m ddpm_ext.integrations` prints.

    cls, method: of the peer. fused: the options that are fused. own: those that run the peer's own code.
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
        relies_on: the peer's methods whose work the fused ones do, too. Where somebody has replaced any of the two, the
            object's own code runs.
    """

    library: ClassVar[str]
    replaces: ClassVar[tuple[str, ...]]
    relies_on: ClassVar[tuple[str, ...]] = ()
    _peer: ClassVar[type]  # the class that this one is made of
    _known: ClassVar[type]  # the library's class that it is, or that it is a subclass of
    _restore: ClassVar[Callable[[type], Any]]  # of a peer's class: an accelerated object without state

    @property
    def accelerated(self) -> Acceleration:
        """The settings: see Acceleration."""
        found = self.__dict__.get("_acceleration")
        if found is None:  # the object was made by its class, not by accelerate
            found = self.__dict__["_acceleration"] = Acceleration()
        return found

    def __repr__(self) -> str:
        return f"{shown(self)}\n{super().__repr__()}"

    def _check(self) -> None:
        """Is called once for each new object. Raises TypeError where the object is not what its class promises."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles name the peer's class, which can be imported, and leave out what is only cached.

        A copy has settings of its own, so that its loops and the original's are counted apart.
        """
        state = {name: value for name, value in self.__dict__.items() if name not in CACHED}
        if "_acceleration" in state:
            state["_acceleration"] = copy.copy(state["_acceleration"])
        return type(self)._restore, (self._peer,), state  # noqa: SLF001 (of this module)


def shown(obj: Any) -> str:
    """A line that says what is accelerated, and what came of it so far."""
    return f"# {type(obj).__name__}, accelerated by ddpm_ext: {obj.accelerated.summary()}"


def peer_class(cls: type) -> type:
    """The peer's class that an accelerated class is made of; any other class itself."""
    return getattr(cls, "_peer", cls)


def peer_method(obj: Any, name: str) -> Callable[..., Any]:
    """The peer's own method of that name, bound to an accelerated object."""
    return getattr(super(Accelerated, obj), name)


def signature_text(function: Any) -> str:
    """As "(self, x, noise=None)", without annotations."""
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def new(made: Any) -> Any:
    """An object without its state."""
    return made.__new__(made)


def accelerated_copy(obj: Any, made: type[Accelerated], settings: Acceleration) -> Any:
    """An object of the accelerated class `made` with the state of the peer's `obj`, which stays as it is.

    Raises TypeError where obj has attributes in place of its class's methods, or is not what the class promises.
    """
    for name in made.replaces:
        if name in vars(obj):
            raise TypeError(f"obj has a {name} of its own, expected its class's")
    accelerated = new(made)
    for name, value in vars(obj).items():  # containers are written to, so they are copied; tensors are replaced
        if name not in CACHED:
            accelerated.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    accelerated.__dict__["_acceleration"] = settings
    accelerated._check()  # noqa: SLF001 (of this module)
    return accelerated


@functools.cache
def make_class(mixin: type[Accelerated], peer: type, known: type, restore: Callable[[type], Any]) -> type:
    """The accelerated class of `peer`, which is `known` or a subclass of it.

    It has the peer's name, so that what the peer's library writes into files names a class of its own.

    Args:
        restore: a function that unpickling can import: of a peer's class, an accelerated object without state.
    """
    own = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_peer": peer, "_known": known, "_restore": staticmethod(restore)}
    return types.new_class(peer.__name__, (mixin, peer), exec_body=lambda namespace: namespace.update(own))
