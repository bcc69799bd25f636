"""Where a traced scheduler is in a loop, and what must be as it was for the loop to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_rows import (
    CONFIG,
    LoopDtypes,
    TracedRows,
    state_contents,
)
from ddpm_ext.ops.extension import C

EDITED = ("sigmas", "alphas_cumprod", "timesteps")


class Settings(NamedTuple):
    """What somebody may edit in the middle of a loop.

    Attributes:
        watched: levels and timesteps, and lists of what steps left, which somebody may empty: the name of each, the
            object, and how often it was written to, if it counts that.
        attributes, items: the config's, which may differ.
    """

    watched: tuple[tuple[str, Any, int | None], ...]
    attributes: dict[str, Any]
    items: dict[str, Any]

    @classmethod
    def of(cls, scheduler: Any, known: Settings | None = None, names: tuple[str, ...] = EDITED) -> Settings:
        """known: some with the same config. names: of the attributes that are watched."""
        values = vars(scheduler)
        watched = C.watched(values, names)
        if known is not None:
            return cls(watched, known.attributes, known.items)
        config = values[CONFIG]
        return cls(watched, dict(vars(config)), dict(config))

    def are_those_of(self, scheduler: Any) -> bool:
        """Whether all are the same objects with the same contents. No tensor is read."""
        return bool(C.unchanged(scheduler.__dict__, *self))

    def renewed(self, scheduler: Any, began: Mapping[str, Any]) -> Settings | None:
        """The settings of now, where copies of tensors and moved ones are no edits; None where something was edited. A
        list is the one that the loop began with: rows fill none, so that an emptied one has the same contents.

        began: the attributes when the loop began.
        """
        found = Settings.of(scheduler)
        if any(vars(scheduler).get(name) is not x for name, x, _ in self.watched if type(x) is list):
            return None
        contents = [state_contents({name: of.get(name) for name in EDITED}) for of in (vars(scheduler), began)]
        return found if found[1:] == self[1:] and contents[0] == contents[1] else None


def repeated_call(
    args: tuple[Any, ...], options: dict[str, Any], timesteps: Tensor, first: int, settings: Settings
) -> Any:
    """Repeated's call, of a loop that begins at the place `first` of the timesteps; None where a step with these
    arguments may need another look at them."""
    return C.repeated_call(args, options, timesteps, first, *settings)


class Repeated(NamedTuple):
    """A loop's last step. One with arguments of the same kinds needs no other look at them. Copies and pickles have
    none.

    Attributes:
        of_loop: the dtypes of the loop.
        call: of the compiled module. row_of(the scheduler's attributes, args, kwargs) is the row of a step with these
            arguments, None unless it is like the last one; is_at(row, attributes, timestep) says whether that is the
            row's timestep, both not where settings were edited; has_kinds(args, kwargs) whether they are like the last
            ones, whatever the timestep. No tensor is read: it may be on a GPU.
    """

    of_loop: LoopDtypes
    call: Any

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(
        cls,
        loop: LoopPosition,
        of_loop: LoopDtypes,
        args: tuple[Any, ...],
        options: dict[str, Any],
        timesteps: Tensor,
    ) -> Repeated | None:
        """For the steps after the loop's next one, which has these arguments; None where they may need another look.

        timesteps: the scheduler's, of which the given one is an element.
        """
        call = repeated_call(args, options, timesteps, loop.rows.first, loop.settings)
        return None if call is None else cls(of_loop, call)


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
        return bool(C.is_unwritten(sample, self.sample, self.version)) and not is_differentiated


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
        return not C.is_unwritten(x, self.sample, self.version)


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
        return self.at == len(self.rows.trace.steps)

    def has_index_of(self, scheduler: Any) -> bool:
        """Whether the scheduler's index is what the last step left: that, and no timestep, is the place of a step."""
        return bool(scheduler.__dict__.get("_step_index") == self.rows.indexes[self.at])

    def has_counters_of(self, scheduler: Any) -> bool:
        """Whether all else that steps count, as the order that they have reached, is what the last one left, too."""
        for name, values in self.rows.counters:  # noqa: SIM110 (in half the time)
            if scheduler.__dict__.get(name) != values[self.at]:
                return False
        return True
