"""Where a traced scheduler is in a loop, and what must be as it was for the loop to go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.next_input import SIMPLE
from ddpm_ext.integrations.diffusers.traced_rows import (
    CONFIG,
    READ_HERE,
    LoopDtypes,
    TracedRows,
    outside,
    replaced,
    state_contents,
)
from ddpm_ext.ops.extension import C
from ddpm_ext.tables.trace_watch import MISSING

EDITED = ("sigmas", "alphas_cumprod", "timesteps")


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
    def of(cls, scheduler: Any, known: Settings | None = None) -> Settings:
        """known: some with the same config."""
        values, watched = vars(scheduler), []
        for name in EDITED:
            x = values.get(name)
            counts = isinstance(x, Tensor) and not x.is_inference()
            watched.append((name, x, x._version if counts else None))
        if known is not None:
            return known._replace(watched=tuple(watched))
        config = values[CONFIG]
        return cls(tuple(watched), dict(vars(config)), dict(config))

    def are_those_of(self, scheduler: Any) -> bool:
        """Whether all are the same objects with the same contents. No tensor is read."""
        return bool(C.unchanged(scheduler.__dict__, *self))

    def renewed(self, scheduler: Any, began: Mapping[str, Any]) -> Settings | None:
        """The settings of now, where copies of tensors and moved ones are no edits; None where something was edited.

        began: the attributes when the loop began.
        """
        found = Settings.of(scheduler)
        contents = [state_contents({name: of.get(name) for name in EDITED}) for of in (vars(scheduler), began)]
        return found if found[1:] == self[1:] and contents[0] == contents[1] else None


class Repeated(NamedTuple):
    """A loop's last step. One with arguments of the same kinds needs no other look at them. Copies and pickles have
    none.

    Attributes:
        of_loop: the dtypes of the loop.
        call: of the compiled module. is_for(row, the scheduler's attributes, args, kwargs) says whether a step with
            these arguments is that of the row, and like the last one; is_at(row, attributes, timestep) whether that is
            the row's timestep, both False where settings were edited; has_kinds(args, kwargs) whether they are like the
            last ones, whatever the timestep. No tensor is read: it may be on a GPU.
        take: the TableStep's, of rows that are launches alone, on a CPU; None: each step asks for it.
    """

    of_loop: LoopDtypes
    call: Any
    take: Callable[..., Tensor] | None

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(
        cls, loop: LoopPosition, of_loop: LoopDtypes, args: Sequence[Any], options: Mapping[str, Any], timesteps: Tensor
    ) -> Repeated | None:
        """For the steps after the loop's next one, which has these arguments; None where they may need another look.

        timesteps: the scheduler's, of which the given one is an element.
        """
        m, timestep, x = args
        if not (type(m) is type(x) is type(timestep) is Tensor) or timestep.dim():
            return None
        if any(isinstance(y, Tensor) for y in options.values()):
            return None
        call = C.RepeatedCall(m, x, timesteps, loop.rows.first, dict(options), *loop.settings)
        is_bound = x.is_cpu and True in of_loop.alone
        return cls(of_loop, call, loop.rows.stepper.step_for(x.device, x.dtype).take if is_bound else None)


class Begun(NamedTuple):
    """How an object's last loop began. One that begins alike has the same rows. Copies and pickles have none.

    Attributes:
        rows, repeated: the loop's.
        settings: those of `rows.scheduler`.
        names: the attributes of the scheduler on which the rows hang, beside its config.
        outside: what else they hang on.
    """

    rows: TracedRows
    repeated: Repeated
    settings: Settings
    names: frozenset[str]
    outside: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(cls, rows: TracedRows, repeated: Repeated) -> Begun | None:
        """None where nobody knows what the rows hang on."""
        read, began = rows.trace.read, rows.scheduler
        if read is None:
            return None
        return cls(rows, repeated, Settings.of(began), (read | READ_HERE) - {CONFIG}, outside(type(began)))

    def settings_of(self, scheduler: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Settings | None:
        """Those of the loop that a step with these arguments begins, if it is such a loop; else None. No tensor on a
        GPU is read."""
        if not self.repeated.call.has_kinds(args, options) or type(args[1]) is not Tensor or args[1].dim():
            return None
        return self.settings_of_rows(scheduler) if scheduler._index_of(args[1]) == self.rows.first else None  # noqa: SLF001 (of a Scheduler)

    def settings_of_rows(self, scheduler: Any) -> Settings | None:
        """Those of a loop that it begins now, if that has the same rows; else None. No tensor on a GPU is read."""
        now, began, cls = scheduler.__dict__, self.rows.scheduler.__dict__, type(self.rows.scheduler)
        if outside(cls) != self.outside or replaced(cls, now):
            return None
        try:
            if not C.unchanged(now, (), self.settings.attributes, self.settings.items):
                return None
        except ValueError:  # of arrays
            return None
        for name in self.names:
            x, y = now.get(name, MISSING), began.get(name, MISSING)
            if x is not y and not _is_same(x, y):
                return None
        return Settings.of(scheduler, self.settings)


def _is_same(x: Any, y: Any) -> bool:
    """Whether attributes are equal, as far as that is seen at once."""
    if type(x) is not type(y):
        return False
    if isinstance(x, Tensor):
        return x.is_cpu and x.dtype is y.dtype and torch.equal(x, y)
    if type(x) is list:
        return {*map(type, x), *map(type, y)} <= SIMPLE and bool(x == y)
    return type(x) in SIMPLE and bool(x == y)


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
    repeated: Repeated | None = None
    last: OwnResult | None = None
    made: Made | None = None

    def is_over(self) -> bool:
        return self.at == len(self.rows.timesteps)

    def has_index_of(self, scheduler: Any) -> bool:
        """Whether the scheduler's index is what the last step left: that, and no timestep, is the place of a step."""
        return bool(scheduler.__dict__.get("_step_index") == self.rows.indexes[self.at])
