"""Where a scheduler is in a loop, and what must be as it was for the loop to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_rows import EDITED, TracedRows, state_contents
from ddpm_ext.ops.extension import C
from ddpm_ext.tables.trace_watch import CONFIG


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
    def of(cls, scheduler: Any, names: tuple[str, ...] = EDITED) -> Settings:
        """names: of the attributes that are watched."""
        values = vars(scheduler)
        config = values[CONFIG]
        return cls(C.watched(values, names), dict(vars(config)), dict(config))

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


class LastResult(NamedTuple):
    """The sample that a loop's last step returned, where what comes next must know whether it is given that one.

    Attributes:
        sample, version: the tensor, and how often it had been written to. A pickle has None: there, `copy` tells.
        copy: the same numbers in a tensor that nobody else has, where the scheduler itself keeps them, so that its next
            step reads them whatever sample it is given; else None.
        model_input: what scale_model_input returns for the sample, which the step has written as well; else None.
    """

    sample: Tensor | None
    version: int
    copy: Tensor | None
    model_input: Tensor | None

    def __deepcopy__(self, memo: object) -> LastResult:
        return self._replace(model_input=None)  # who gets it may write to it

    def __reduce__(self) -> Any:
        return LastResult, (None, 0, self.copy, None)

    def is_of(self, sample: object) -> bool:
        """Whether that is the very tensor that the step returned, as it was."""
        return bool(C.is_unwritten(sample, self.sample, self.version))

    def may_differ(self, x: Tensor) -> bool:
        """Whether there is a copy and x may have other numbers."""
        if self.copy is None:
            return False
        return not (torch.equal(x, self.copy.to(x)) if self.sample is None else self.is_of(x))


class LoopPosition(NamedTuple):
    """Where an object is in a loop: the next row, and what the last rows kept, the newest first.

    Attributes:
        settings: the scheduler's when the loop began.
        last: the last step's result; None where nothing is to be known of it.
    """

    rows: TracedRows
    settings: Settings
    at: int = 0
    ring: tuple[Tensor, ...] = ()
    last: LastResult | None = None

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
