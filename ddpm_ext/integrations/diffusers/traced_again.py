"""Calls of a traced scheduler that are like the last ones: what they leave out, so that they take little more time than
their launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.compiler import is_compiling


def repeating_step(step: Callable[..., Any], peer: Any) -> Callable[..., Any]:
    """A step that is like the last one, or begins a loop as the last one began, leaves out all that `step` would do
    before its row, and one in a loop without rows what it would do before the peer's own."""

    @functools.wraps(step)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return step(self, *args, **kwargs)
        attributes = self.__dict__
        loop = attributes.get("_traced_loop")
        if loop is False:
            return getattr(peer, step.__name__)(self, *args, **kwargs)
        if loop is None:
            following = attributes.get("_next_loop")
            is_like = following is not None and following.begins(attributes, args, kwargs)
            loop = following.loop if is_like else None
            repeated: Any = None if loop is None else loop.repeated
        else:
            rows, _, at, _, repeated, _, _ = loop  # in less time than by name
            is_like = repeated is not None and attributes.get("_step_index") == rows.indexes[at]
            is_like = is_like and (not rows.counters or loop.has_counters_of(self))
            is_like = is_like and repeated.call.row_of(attributes, args, kwargs) == at
        if not is_like:
            return step(self, *args, **kwargs)
        result = self._take_row(loop, repeated.of_loop, args[0], args[2], (), kwargs, repeated)
        attributes["_acceleration"].fused_calls += 1
        return result

    return call


def repeating_scale(scale: Callable[..., Any], peer: Any) -> Callable[..., Any]:
    """scale_model_input of what the last step returned, before the first step of a loop that begins as the last one
    began, and in a loop without rows or without scales."""

    @functools.wraps(scale)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return scale(self, *args, **kwargs)
        attributes = self.__dict__
        loop = attributes.get("_traced_loop")
        if loop is None:
            following = attributes.get("_next_loop")
            scaled = None if following is None else following.scaled(attributes, args, kwargs)
            return scale(self, *args, **kwargs) if scaled is None else scaled
        if loop is False or not loop.rows.stepper.scales:
            return peer.scale_model_input(self, *args, **kwargs)
        if loop.made is not None and loop.repeated is not None and len(args) == 2 and not kwargs:
            is_next = loop.made.is_of(args[0]) and loop.has_index_of(self)
            if is_next and loop.repeated.call.is_at(loop.at, attributes, args[1]):
                return self._made(loop)
        return scale(self, *args, **kwargs)

    return call
