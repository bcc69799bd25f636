"""Where a traced scheduler is in a loop, and what must be as it was for the loop to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_plan import HELD, Kinds, Plan
from ddpm_ext.integrations.tensors import written
from ddpm_ext.ops.fused import ReverseStep

__all__ = ["Lane", "Loop", "Settings"]

EDITED = ("sigmas", "alphas_cumprod", "timesteps")
FUNCTORCH = torch._C._functorch


class Settings(NamedTuple):
    """What somebody may edit in the middle of a loop.

    Attributes:
        watched: levels and timesteps: the name of each, the object, and how often it was written to, if it counts that.
        attributes, items: the config's, which may differ.
    """

    watched: tuple[tuple[str, Any, int | None], ...]
    attributes: dict[str, Any]
    items: dict[str, Any]

    @classmethod
    def of(cls, scheduler: Any) -> Settings:
        config, state = scheduler.config, vars(scheduler)
        watched = tuple((name, state.get(name), _count(state.get(name))) for name in EDITED)
        return cls(watched, dict(vars(config)), dict(config))

    def are_those_of(self, scheduler: Any) -> bool:
        """Whether all are the same objects with the same contents. No tensor is read."""
        config, state = scheduler.config, scheduler.__dict__
        for name, value, count in self.watched:
            if state.get(name) is not value or (count is not None and value._version != count):
                return False
        return self.attributes == config.__dict__ and bool(config == self.items)

    def renewed(self, scheduler: Any, began: Mapping[str, Any]) -> Settings | None:
        """The settings of now, where copies of tensors and moved ones are no edits; None where something was edited. A
        tensor is read only if it is another one.

        began: the attributes when the loop began, on the CPU.
        """
        found = Settings.of(scheduler)
        if found.attributes != self.attributes or found.items != self.items:
            return None
        for (name, value, count), (_, before, before_count) in zip(found.watched, self.watched, strict=True):
            if value is before and count == before_count:
                continue
            if not isinstance(value, Tensor) or not isinstance(before, Tensor):
                return None
            if value.dtype != before.dtype or not torch.equal(value.cpu(), began[name]):
                return None
        return found


def _count(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


class Lane(NamedTuple):
    """The arguments of a loop's last step. A step with arguments of the same kinds needs no other look at them.

    Copies and pickles have none.

    Attributes:
        kinds: of the loop's results.
        dtypes: of output and sample.
        computed: the dtype of the operator's sample.
        shape, device: of both.
        address, stride: where the timestep of the loop's first row lies in memory, and how many bytes lie between two.
        of_timesteps: their dtype.
        options: the other arguments, none of them a tensor.
        quiet_step: takes rows without noise, where they are plain and give no clean sample.
    """

    kinds: Kinds
    dtypes: tuple[torch.dtype, torch.dtype]
    computed: torch.dtype
    shape: torch.Size
    device: torch.device
    address: int
    stride: int
    of_timesteps: torch.dtype
    options: dict[str, Any]
    quiet_step: ReverseStep | None

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(
        cls,
        loop: Loop,
        kinds: Kinds,
        computed: torch.dtype,
        args: Sequence[Any],
        options: Mapping[str, Any],
        stride: int,
    ) -> Lane | None:
        """For the steps after the loop's next one, which has these arguments; None where they may need another look.

        stride: that of the scheduler's timesteps, of which the given one is an element.
        """
        m, timestep, x = args
        if not (type(m) is type(x) is type(timestep) is Tensor) or any(isinstance(y, Tensor) for y in options.values()):
            return None
        assert loop.plan is not None
        if timestep.dim() or kinds.has_path:  # which is made of a step's arguments
            return None
        stride *= timestep.element_size()
        address = timestep.data_ptr() - loop.at * stride
        quiet_step = None if loop.plan.trace.second else loop.plan.rows.quiet_step(x.device)
        return cls(
            kinds, (m.dtype, x.dtype), computed, x.shape, x.device, address, stride, timestep.dtype, dict(options),
            quiet_step,
        )  # fmt: skip

    def is_for(self, loop: Loop, args: Sequence[Any], options: Mapping[str, Any], scheduler: Any) -> bool:
        """Whether a step with these arguments is the loop's next one, and of the same kinds as the last one."""
        m, timestep, x = args
        if type(x) is not Tensor or type(m) is not Tensor or type(timestep) is not Tensor:
            return False
        if (m.dtype, x.dtype) != self.dtypes or timestep.dtype is not self.of_timesteps or timestep.dim():
            return False
        if x.shape != self.shape or m.shape != self.shape or x.device != self.device or m.device != self.device:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or m.requires_grad):
            return False
        if FUNCTORCH.peek_interpreter_stack() is not None or FUNCTORCH.is_legacy_batchedtensor(m):
            return False
        if len(options) != len(self.options):
            return False
        for name, value in options.items():
            if self.options.get(name, self) is not value:
                return False
        # An element of the scheduler's own timesteps is known by where it lies. It is not read: it may be on a GPU.
        if timestep.data_ptr() != self.address + loop.at * self.stride:
            return False
        assert loop.settings is not None
        return loop.settings.are_those_of(scheduler)


class Loop(NamedTuple):
    """Where an object is in a loop: the next row, and what the last rows kept, the newest first.

    Attributes:
        plan: None where diffusers' own code takes all steps until set_timesteps is called again.
        settings: the scheduler's when the loop began.
        last: the last row's sample, output and result, and how often they were written to, where diffusers would keep
            some of them.
        lane: None where the next step's arguments are to be looked at, whatever they are.
    """

    plan: Plan | None
    at: int = 0
    settings: Settings | None = None
    ring: tuple[Tensor, ...] = ()
    last: tuple[tuple[Tensor, Tensor, Tensor], list[int]] | None = None
    lane: Lane | None = None

    def is_over(self) -> bool:
        return self.plan is not None and self.at == len(self.plan.timesteps)

    def followed(self, x: Tensor, m: Tensor, prev: Tensor, kept: Tensor | None, lane: Lane | None) -> Loop:
        """The loop after a row with this sample, output and result."""
        assert self.plan is not None
        at = self.at + 1
        ring = self.ring if kept is None else (kept, *self.ring[: HELD - 1])
        last = None if self.plan.stateless else ((x, m, prev), [written(x), written(m), written(prev)])
        return Loop(self.plan, at, self.settings, ring, last, lane if at < len(self.plan.timesteps) else None)
