"""Tests whether the methods of an object are a library's code. By default, accelerate() replaces only such steps."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

DIFFUSERS = "diffusers"
# A subclass of a scheduler may override these methods: a step does not call them, but reads attributes that they set.
OVERRIDABLE = {"__init__", "set_timesteps"}
STEPS = ("step", "step_pred", "scale_model_input")
# If a class defines one of these methods, any access to an attribute may run its code.
HOOKS = ("__getattribute__", "__getattr__", "__setattr__", "__delattr__")


def is_code_of(function: Any, *packages: str) -> bool:
    """Whether a function, and every function that it wraps, is code of these packages or of torch."""
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", "")
        if not any(module == name or module.startswith(f"{name}.") for name in (*packages, "torch")):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def is_sampler_of_k_diffusion(function: Callable[..., Any]) -> bool:
    """Whether a function is a sampler of k-diffusion, or of a copy of k-diffusion, as ComfyUI and Forge have one."""
    home = "k_diffusion.sampling"
    name = getattr(function, "__module__", None) or ""
    return (name == home or name.endswith(f".{home}")) and is_code_of(function, name)


def foreign_method(cls: type, state: Mapping[str, Any]) -> str | None:
    """The name of a method through which a scheduler's step may run code from outside diffusers, or None.

    A subclass may override `__init__` and `set_timesteps`, and may define methods with new names. Its properties count
    as foreign, because a property may replace any attribute.

    Args:
        cls: the object's class.
        state: the object's attributes.
    """
    names = _methods(cls)
    if not names.isdisjoint(state):
        return min(names & state.keys())
    hooks = tuple([getattr(cls, name, None) for name in HOOKS])
    return _foreign(cls, tuple([getattr(cls, name) for name in names]), hooks)


def library_class(cls: type) -> type:
    """The first class in a scheduler's MRO that diffusers defines."""
    return next(base for base in cls.__mro__ if base.__module__.partition(".")[0] == DIFFUSERS)


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    """The names of the methods of diffusers' class that a step may call."""
    diffusers_class = library_class(cls)
    return frozenset(
        name
        for name in dir(diffusers_class)
        if callable(getattr(diffusers_class, name)) and not name.startswith("__") and name not in OVERRIDABLE
    )


@functools.lru_cache(256)
def _foreign(cls: type, methods: tuple[Any, ...], hooks: tuple[Any, ...]) -> str | None:
    """foreign_method of a class alone, cached. `methods` and `hooks` are in the key: a user may replace them later."""
    for name, hook in zip(HOOKS, hooks, strict=True):
        is_default = hook is None or isinstance(hook, types.WrapperDescriptorType)
        if not is_default and not is_code_of(hook, DIFFUSERS, "huggingface_hub"):
            return name
    diffusers_class = library_class(cls)
    for base in cls.__mro__[: cls.__mro__.index(diffusers_class)]:
        for name, value in vars(base).items():
            if not (name.startswith("__") or name in OVERRIDABLE or _is_new(name, value, diffusers_class)):
                return name
    step_methods = [getattr(cls, name, None) for name in STEPS]  # `methods` lacks a step that only the subclass defines
    for method in (*methods, *[step for step in step_methods if step is not None]):
        if not is_code_of(getattr(method, "__func__", method), DIFFUSERS, "huggingface_hub"):
            return str(getattr(method, "__name__", method))
    return None


def _is_new(name: str, value: Any, diffusers_class: type) -> bool:
    """Whether an attribute of a subclass replaces no code of diffusers' class, and is no property.

    It may have a new name, or be a plain value that replaces another.
    """
    if isinstance(getattr(diffusers_class, name, None), property) or isinstance(value, property):
        return False
    is_plain = not hasattr(value, "__get__")  # a number, a list
    return (is_plain and not callable(getattr(diffusers_class, name, None))) or not hasattr(diffusers_class, name)
