"""A copy of a scheduler that tells what it reads, and keeps float64, as fast as the scheduler itself: a look at each of
torch's functions that it calls takes as long as they do."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

NARROW = (torch.float32, torch.float16, torch.bfloat16)
FLOAT = (torch.float32,)
NOISE = "randn_tensor"  # what diffusers' schedulers draw their noise by
OTHER_NUMBERS = {  # the names of torch's functions that draw such as are not normal, or not of one tensor's shape
    "rand", "rand_like", "randint", "randint_like", "randperm", "normal", "bernoulli", "multinomial", "poisson",
    "normal_", "uniform_", "exponential_", "bernoulli_", "random_",
}  # fmt: skip
# Names in a method or a function by which it may draw noise in another way, or read attributes.
UNSEEN = {"randn", "randn_like", "vars", "__dict__", *OTHER_NUMBERS}
OWN_WAYS = {"__init_subclass__", "__new__", "__setattr__", "__getattribute__", "__slots__"}
CONFIG = "_internal_dict"  # the attribute of diffusers' schedulers that has their configuration
MISSING = object()
SIMPLE = bool, int, float, str
CONSTANT = {*SIMPLE, type(None)}


class Wide(Tensor):
    """A tensor that stays float64. What is computed of it is an ordinary tensor."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # noqa: SLF001 (as torch.nn.Parameter has it)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args == FLOAT:  # most calls are of this kind
            return self
        args, kwargs = wide_arguments(args, kwargs)
        return Tensor.to(self, *args, **kwargs) if args or kwargs else self

    def float(self, *_: Any, **__: Any) -> Any:
        return self

    half = bfloat16 = float


def wide_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of Tensor.to without a lower precision."""
    args = tuple(x for x in args if not (isinstance(x, torch.dtype) and x in NARROW))
    return args, {name: x for name, x in kwargs.items() if not (name == "dtype" and x in NARROW)}


class Watch:
    """Makes copies of a scheduler whose attributes are copied when they are first read.

    Attributes:
        loaded: what the last copy has read of attributes that it had not written, or MISSING.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self._names: set[str] = set()

    def read(self) -> frozenset[str]:
        """The names of all that copies have read before they wrote it, whether it was there or not."""
        return frozenset(self._names.union(self.loaded))

    def copy(self, scheduler: Any, draw: Callable[..., Tensor]) -> Any:
        """A copy of a scheduler that can_watch. draw: in the place of diffusers' randn_tensor."""
        cls: Any = type(scheduler)
        state = vars(scheduler)
        known = _known(cls)
        assert known is not None
        own = known.watched.__new__(known.watched)
        self._names.update(self.loaded)
        own.watched_state, own.watched_reads = state, self.loaded = state, {}
        for name in state.keys() & known.names:  # which are found in the class, so that nobody is asked for them
            value = state[name] if name == CONFIG else copied(state[name])  # no step writes to a config: it is frozen
            own.__dict__[name] = self.loaded[name] = value
        for name in known.draws:
            method = getattr(cls, name)
            if not isinstance(method, types.FunctionType):
                continue
            found = method.__globals__ | {NOISE: draw}
            function = types.FunctionType(method.__code__, found, name, method.__defaults__, method.__closure__)
            function.__kwdefaults__ = method.__kwdefaults__
            own.__dict__[name] = types.MethodType(function, own)
        return own


def can_watch(scheduler: Any) -> bool:
    """Whether all that an object draws and reads is seen in a copy of Watch's, as far as its methods' code tells."""
    cls: Any = type(scheduler)
    own = any(isinstance(value, types.FunctionType | types.MethodType) for value in vars(scheduler).values())
    return not own and _known(cls) is not None


def copied(value: Any) -> Any:
    """A copy of an attribute, on the CPU."""
    if type(value) in CONSTANT:
        return value
    if isinstance(value, Tensor):
        own = value if value.is_cpu else value.cpu()
        return (own.detach() if own.requires_grad else own).clone()
    return copy.deepcopy(value)


def is_simple(value: object) -> bool:
    """Whether it is a number, also in a tensor, a string or None."""
    return value is None or isinstance(value, SIMPLE) or (isinstance(value, Tensor) and not value.dim())


class _Known(NamedTuple):
    """What is known of a class.

    Attributes:
        watched: the class of its watched copies.
        names: those that it has in the class, and its config's, which a class may read by __dict__.
        draws: the methods that draw noise.
    """

    watched: Any
    names: frozenset[str]
    draws: list[str]


@functools.lru_cache(maxsize=64)
def _known(cls: Any) -> _Known | None:
    """None for a class that cannot be watched."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        members |= vars(base)
    if type(cls) is not type or not cls.__dictoffset__ or members.keys() & OWN_WAYS:
        return None
    draws = []
    for name, member in members.items():
        function = _function_of(member)
        if function is None or name in ("__init__", "__getattr__"):
            continue
        found, beside = set(_names_in(function)), _names_beside(function)
        if found & UNSEEN or beside & {*UNSEEN, NOISE} or (NOISE in found and function is not member):
            return None
        if NOISE in found and name != "add_noise":
            draws.append(name)
    own = {"__slots__": ("watched_state", "watched_reads"), "__getattr__": _first_read(members.get("__getattr__"))}
    own |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    watched = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(own))
    return _Known(watched, frozenset({*members, CONFIG}), draws)


def _function_of(member: Any) -> types.FunctionType | None:
    """A method's function, also where it is wrapped, or a property."""
    function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
    return function if isinstance(function, types.FunctionType) else None


@functools.lru_cache(maxsize=256)  # most are methods that all schedulers have
def _names_beside(function: types.FunctionType) -> set[str]:
    """The names in the functions that a function calls, apart from NOISE, and in those that they call."""
    found: set[str] = set()
    called, waiting = set(), [function]
    while waiting:
        caller = waiting.pop()
        for name in _names_in(caller):
            value = caller.__globals__.get(name)
            each = _function_of(value) if isinstance(value, types.FunctionType) else None
            if each is not None and name != NOISE and each not in called:
                called.add(each)
                waiting.append(each)
                found.update(_names_in(each))
    return found


def _names_in(function: types.FunctionType) -> Iterator[str]:
    """The global names and attributes in a function's code."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]


def _first_read(own: Callable[[Any, str], Any] | None) -> Callable[[Any, str], Any]:
    """__getattr__, which Python calls for attributes that an object doesn't have. own: the class's."""

    def first_read(self: Any, name: str) -> Any:
        if name in self.watched_state:
            value = self.__dict__[name] = self.watched_reads[name] = copied(self.watched_state[name])
            return value
        self.watched_reads[name] = MISSING
        if own is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return own(self, name)

    return first_read
