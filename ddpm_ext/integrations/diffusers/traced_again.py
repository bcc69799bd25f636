"""Calls of a traced scheduler that are like the last ones: what they leave out, so that they take little more time than
their launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ddpm_ext.integrations.diffusers.traced_loop import LoopPosition, Made
from ddpm_ext.integrations.tensors import written
from ddpm_ext.ops.result_memory import empty_like


def repeating_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that is its row's launch alone, and like the last one, leaves out all that `step` would do before it."""

    @functools.wraps(step)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attributes = self.__dict__
        loop = None if torch.compiler.is_compiling() else attributes.get("_traced_loop")
        if not loop or loop.repeated is None:
            return step(self, *args, **kwargs)
        rows, _, at, _, repeated, _, made = loop
        of_loop = repeated.of_loop
        is_next = of_loop.alone[at] and attributes.get("_step_index") == rows.indexes[at]
        if not is_next or not repeated.call.is_for(at, attributes, args, kwargs):
            return step(self, *args, **kwargs)
        x, is_last = args[2], at + 1 == len(of_loop.alone)
        take, model_input, x0 = repeated.take, None, empty_like(x) if rows.trace.second else None
        if self._scales_inputs and made is None and not is_last and rows.stepper.scales:
            take, model_input = rows.stepper.scales.stepper.step_for(x.device, x.dtype).take, empty_like(x)
        elif take is None:
            take = rows.stepper.step_for(x.device, x.dtype).take
        prev = take(x, args[0], None, at, None, x0_out=x0, model_input=model_input)
        if model_input is not None:
            made = Made(prev, written(prev), model_input)
        self.accelerated.fused_calls += 1
        position = LoopPosition(rows, loop.settings, at + 1, (), None if is_last else repeated, None, made)
        return self._taken(position, of_loop, kwargs, prev, x0)

    return call


def repeating_scale(scale: Callable[..., Any]) -> Callable[..., Any]:
    """scale_model_input of what the last step returned."""

    @functools.wraps(scale)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        loop = None if torch.compiler.is_compiling() else self.__dict__.get("_traced_loop")
        if loop and loop.made is not None and loop.repeated is not None and len(args) == 2 and not kwargs:
            is_next = loop.made.is_of(args[0]) and loop.has_index_of(self)
            if is_next and loop.repeated.call.is_at(loop.at, self.__dict__, args[1]):
                return self._made(loop)
        return scale(self, *args, **kwargs)

    return call
