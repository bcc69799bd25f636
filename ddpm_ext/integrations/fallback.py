"""Fallback, the exception that makes an accelerated object's method run the library's code; and a cache of results,
which also stores the Fallbacks of functions that raised one.

A call of a method has no fused form if the operators don't take its options, dtypes or shapes. "The library" is the
library of the accelerated object's class; names of variables call it the peer.
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
CACHED = 16  # the largest number of entries in an object's cache, which has the object's latest rows, trials and proofs


class Fallback(Exception):
    """Raised if a call has no fused form, so that the library's code runs.

    Args:
        reason: the reason, for the warning and `.accelerated.fallbacks`. With None nothing is recorded: in most
            of these cases the library's code rejects the arguments with an error of its own.
        instead: a function without arguments to run in place of the library's method. It is for calls that have already
            called the model or another function of the caller, which must not be called a second time.
    """

    def __init__(self, reason: str | None = None, instead: Callable[[], Any] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.instead = instead


def with_fallback(
    method: str | None = None, peers_code: Function | None = None, *, compiles: bool = True
) -> Callable[[Function], Function]:
    """Decorator of a method of an Accelerated class. The library's method runs if the method raises a Fallback, or if
    the call's arguments do not fit its signature.

    Args:
        method: the library's name of the method. Default: the name of the decorated function.
        peers_code: runs in place of the library's method, as peers_code(method, obj, ...) with the method's name, the
            object and the call's arguments.
        compiles: whether torch.compile may trace the method. If not, compiled code runs the library's method.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__ if method is None else method
        run_peers_code = _run_peers_method if peers_code is None else peers_code

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
                # If the traceback has one frame, the arguments did not fit the function's signature, so its code did
                # not run. The library's method then raises the TypeError, which names this method.
                if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                    raise
                reason = instead = None
            # This comes after the handler: otherwise Python would show the Fallback as the context of later errors.
            if reason is not None:
                self.accelerated.record_fallback(self.library, name, reason)
            return run_peers_code(name, self, *args, **kwargs) if instead is None else instead()

        @functools.wraps(function)
        def call_unless_compiling(self: Any, *args: Any, **kwargs: Any) -> Any:
            # This is not in `call`, since record_fallback's warning breaks the graph of torch.compile, which can't
            # resume a function that has an exception handler.
            if torch.compiler.is_compiling():
                self.accelerated.record_fallback(self.library, name, "it is being compiled")
                return run_peers_code(name, self, *args, **kwargs)
            return call(self, *args, **kwargs)

        return call if compiles else call_unless_compiling

    return decorate


def _run_peers_method(method: str, obj: Any, *args: Any, **kwargs: Any) -> Any:
    return peer_method(obj, method)(*args, **kwargs)


def returning(value: Any) -> nn.Module:
    """A module that returns `value` for any arguments. It replaces a model or function that was called already."""
    module = nn.Identity()
    module.forward = lambda *_, **__: value  # type: ignore[method-assign]
    return module


def attempt(make: Callable[..., Result], *args: Any) -> Result | Fallback:
    """Returns make(*args), or the Fallback that it raises, which a cache can store. `result_of` raises it again."""
    try:
        return make(*args)
    except Fallback as fallback:
        return Fallback(fallback.reason)  # a new one without a traceback, which would keep frames and tensors alive


def made_outside_autograd(make: Callable[..., Result], *args: Any) -> Result | Fallback:
    """`attempt` with gradients and inference mode off, so that a backward pass may save the result's tensors."""
    with torch.inference_mode(False), torch.no_grad():
        return attempt(make, *args)


def result_of(attempted: Result | Fallback) -> Result:
    """The result that `attempt` returned, unless this is a Fallback, which is raised."""
    if isinstance(attempted, Fallback):
        raise Fallback(attempted.reason)
    return attempted


def cached_with(obj: Any, key: Hashable, make: Callable[[], Result], values: Any = None) -> Result:
    """The result of make(), cached in an attribute of `obj` for the latest CACHED keys.

    Copies and pickles of the object leave out the cache. If make() raises a Fallback, it is cached and raised. Within a
    function transform, a result that is not cached yet raises a Fallback.

    Args:
        values: the objects whose ids are in the key. The cache references them: otherwise Python could free one and
            give its id to a new object.
    """
    cache: BoundedCache[Any] | None = obj.__dict__.get("_fused_cache")
    entry = None if cache is None else cache.get(key)
    return result_of((_make_cached(obj, key, make, values) if entry is None else entry)[0])


@torch.compiler.disable  # a graph break within this function leads to an internal error of torch 2.7
def _make_cached(obj: Any, key: Hashable, make: Callable[[], Any], values: Any) -> tuple[Any, Any]:
    if not is_plain(torch.empty(0, device="cpu")):
        raise Fallback("its tables are first asked for within a function transform")
    cache: BoundedCache[Any] = obj.__dict__.setdefault("_fused_cache", BoundedCache(CACHED))
    return cache.get_or_make(key, lambda: (made_outside_autograd(make), values))
