"""How a call falls back: where it has no fused form, the peer's own code runs.

Options, dtypes or shapes that the operators don't take have no fused form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.checks import is_plain
from ddpm_ext.integrations.shared import peer_method

Function = Callable[..., Any]
Result = TypeVar("Result")
CACHED = 16  # what an object keeps: rows of its latest states, trials and proofs of its steps


class Fallback(Exception):
    """Raised where a call has no fused form, so that the peer's own code runs in its place.

    Args:
        reason: why, for the warning and `.accelerated.fallbacks`. None gives no warning: the peer will reject the
            argument itself.
        instead: what to run in place of the peer's method with the call's arguments, where the model or another
            function of the caller was called already and must not be called again.
    """

    def __init__(self, reason: str | None = None, instead: Callable[[], Any] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.instead = instead


def with_fallback(
    method: str | None = None, own: Function | None = None, *, compiles: bool = True
) -> Callable[[Function], Function]:
    """Decorates a method of an Accelerated class that may raise a Fallback: then the peer's own method runs.

    Args:
        method: the peer's name of the method; without one, that of the decorated function.
        own: what runs then, as own(method, obj, ...) with the call's arguments; without one, the peer's method itself.
        compiles: whether torch.compile may trace the method; if not, it gets the peer's.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__ if method is None else method
        run_own = _run_own if own is None else own

        @functools.wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                result = function(self, *args, **kwargs)
                if not torch.compiler.is_compiling():
                    self.accelerated.fused_calls += 1
                return result
            except Fallback as fallback:
                reason, instead = fallback.reason, fallback.instead
            except TypeError as error:
                # Where the function does not take such arguments, its code did not run: the peer rejects them, in its
                # own method's name.
                if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                    raise
                reason = instead = None
            # Outside of the handler, so that an error of the peer's is not shown as one that came of a Fallback.
            if reason is not None:
                self.accelerated.record_fallback(self.library, name, reason)
            return run_own(name, self, *args, **kwargs) if instead is None else instead()

        @functools.wraps(function)
        def call_unless_compiling(self: Any, *args: Any, **kwargs: Any) -> Any:
            # A function of its own: the compiler can't resume one that has a handler of exceptions after the warning.
            if torch.compiler.is_compiling():
                self.accelerated.record_fallback(self.library, name, "it is being compiled")
                return run_own(name, self, *args, **kwargs)
            return call(self, *args, **kwargs)

        return call if compiles else call_unless_compiling

    return decorate


def _run_own(method: str, obj: Any, *args: Any, **kwargs: Any) -> Any:
    return peer_method(obj, method)(*args, **kwargs)


def returning(value: Any) -> nn.Module:
    """A model, or another function, that returns `value`, in place of one that was called already."""
    module = nn.Identity()
    module.forward = lambda *_, **__: value  # type: ignore[method-assign]
    return module


def attempt(make: Callable[..., Result], *args: Any) -> Result | Fallback:
    """make(*args), or the Fallback that it raises: what a cache can keep. `result_of` turns it back."""
    try:
        return make(*args)
    except Fallback as fallback:
        return Fallback(fallback.reason)  # a new one, without the traceback, which keeps frames alive


def made_outside_autograd(make: Callable[..., Result], *args: Any) -> Result | Fallback:
    """As `attempt`, for what may be kept by a backward pass and used outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return attempt(make, *args)


def result_of(attempted: Result | Fallback) -> Result:
    """What `attempt` made. Raises the Fallback where there is one."""
    if isinstance(attempted, Fallback):
        raise Fallback(attempted.reason)
    return attempted


def cached_with(obj: Any, key: Hashable, make: Callable[[], Result], values: Any = None) -> Result:
    """make(), cached with an object for the latest CACHED keys. Copies and pickles of the object are without it.

    Raises the Fallback that make() raises, which is cached, too. values: the objects whose identities are in the key.
    The cache holds them, so that no others get these identities.
    """
    cache: BoundedCache[Any] | None = obj.__dict__.get("_fused_cache")
    entry = None if cache is None else cache.get(key)
    return result_of((_make_cached(obj, key, make, values) if entry is None else entry)[0])


@torch.compiler.disable  # torch 2.7 has an internal error where a graph breaks in it
def _make_cached(obj: Any, key: Hashable, make: Callable[[], Any], values: Any) -> tuple[Any, Any]:
    if not is_plain(torch.empty(0, device="cpu")):
        raise Fallback("its tables are first asked for within a function transform")
    cache: BoundedCache[Any] = obj.__dict__.setdefault("_fused_cache", BoundedCache(CACHED))
    return cache.get_or_make(key, lambda: (made_outside_autograd(make), values))
