"""Where a traced scheduler is in a loop, and what must be as it was for the loop to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_rows import LoopDtypes, TracedRows, state_contents

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
        values = [(name, vars(scheduler).get(name)) for name in EDITED]
        counts = [x._version if isinstance(x, Tensor) and not x.is_inference() else None for _, x in values]
        watched = tuple((*value, count) for value, count in zip(values, counts, strict=True))
        return cls(watched, dict(vars(scheduler.config)), dict(scheduler.config))

    def are_those_of(self, scheduler: Any) -> bool:
        """Whether all are the same objects with the same contents. No tensor is read."""
        config, state = scheduler.config, scheduler.__dict__
        for name, value, count in self.watched:
            if state.get(name) is not value or (count is not None and value._version != count):
                return False
        return self.attributes == config.__dict__ and bool(config == self.items)

    def renewed(self, scheduler: Any, began: Mapping[str, Any]) -> Settings | None:
        """The settings of now, where copies of tensors and moved ones are no edits; None where something was edited.

        began: the attributes when the loop began.
        """
        found = Settings.of(scheduler)
        contents = [state_contents({name: of.get(name) for name in EDITED}) for of in (vars(scheduler), began)]
        return found if found[1:] == self[1:] and contents[0] == contents[1] else None


class RepeatedCall(NamedTuple):
    """The arguments of a loop's last step. A step with arguments of the same kinds needs no other look at them.

    Copies and pickles have none.

    Attributes:
        of_loop: the dtypes of the loop.
        tensors: dtypes, shapes and devices of output and sample, and the timestep's dtype.
        address, stride: where the timestep of the loop's first row lies in memory, and how many bytes lie between two.
        options: the other arguments, none of them a tensor.
    """

    of_loop: LoopDtypes
    tensors: tuple[Any, ...]
    address: int
    stride: int
    options: Mapping[str, Any]

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(
        cls, loop: LoopPosition, of_loop: LoopDtypes, args: Sequence[Any], options: Mapping[str, Any], timesteps: Tensor
    ) -> RepeatedCall | None:
        """For the steps after the loop's next one, which has these arguments; None where they may need another look.

        timesteps: the scheduler's, of which the given one is an element.
        """
        m, timestep, x = args
        if not (type(m) is type(x) is type(timestep) is Tensor) or timestep.dim():
            return None
        if any(isinstance(y, Tensor) for y in options.values()):
            return None
        stride = timesteps.stride(0) * timestep.element_size()
        address = timestep.data_ptr() - loop.at * stride
        tensors = m.dtype, x.shape, x.device, x.dtype, x.shape, x.device, timestep.dtype
        return cls(of_loop, tensors, address, stride, dict(options))

    def is_for(self, loop: LoopPosition, args: Sequence[Any], options: Mapping[str, Any], scheduler: Any) -> bool:
        """Whether a step with these arguments is the loop's next one, and of the same kinds as the last one."""
        m, timestep, x = args
        if not (type(m) is type(x) is type(timestep) is Tensor) or timestep.dim():
            return False
        if (m.dtype, m.shape, m.device, x.dtype, x.shape, x.device) != self.tensors[:-1]:
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
        return self.is_at(loop.at, timestep) and loop.settings.are_those_of(scheduler)

    def is_at(self, at: int, timestep: Tensor) -> bool:
        """Whether a timestep is that of row `at`. An element of the scheduler's own is known by where it lies. It is
        not read: it may be on a GPU."""
        return timestep.dtype is self.tensors[-1] and timestep.data_ptr() == self.address + at * self.stride


def is_unchanged(x: object, result: Tensor, version: int) -> bool:
    """Whether x is a step's very result, as it was. Inference tensors do not tell whether they were written to."""
    return x is result and not result.is_inference() and result._version == version


class Made(NamedTuple):
    """What a loop's step has made for the model's next call. Copies and pickles have none.

    Attributes:
        sample, version: the step's result, and how often it had been written to.
        model_input: what scale_model_input returns for it.
    """

    sample: Tensor
    version: int
    model_input: Tensor

    def __reduce__(self) -> Any:
        return type(None), ()

    def is_of(self, sample: object) -> bool:
        """Whether that is the very tensor that the step returned, as it was."""
        is_differentiated = self.sample.requires_grad and torch.is_grad_enabled()
        return is_unchanged(sample, self.sample, self.version) and not is_differentiated


class OwnResult(NamedTuple):
    """The result of a loop's last step, for the next one, which takes a part of it whatever somebody makes of it.

    Attributes:
        sample, version: the result, and how often it had been written to. Pickles have None: there, its numbers tell.
        copy: the same numbers, which nobody writes to.
    """

    sample: Tensor | None
    version: int
    copy: Tensor

    def __deepcopy__(self, memo: object) -> OwnResult:
        return self

    def __reduce__(self) -> Any:
        return OwnResult, (None, 0, self.copy)

    def may_differ(self, x: Tensor) -> bool:
        """Whether x may be another sample than that."""
        if self.sample is None:
            return not torch.equal(x, self.copy.to(x))
        return not is_unchanged(x, self.sample, self.version)


class LoopPosition(NamedTuple):
    """Where an object is in a loop: the next row, and what the last rows kept, the newest first.

    Attributes:
        settings: the scheduler's when the loop began.
        repeated: None where the next step's arguments are to be looked at, whatever they are.
        last: None where the next row takes no part of it.
        made: by the last step that made some and of which it was not asked for, as by a pipeline that doubles its batch
            before it scales it. No later step makes any then.
    """

    rows: TracedRows
    settings: Settings
    at: int = 0
    ring: tuple[Tensor, ...] = ()
    repeated: RepeatedCall | None = None
    last: OwnResult | None = None
    made: Made | None = None

    def is_over(self) -> bool:
        return self.at == len(self.rows.timesteps)
