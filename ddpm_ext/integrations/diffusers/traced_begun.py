"""How a traced scheduler's loop began, and the next one that begins alike: set_timesteps finds its rows again, so that
its first calls cost little more than later ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.traced_loop import EDITED, LoopPosition, Repeated, Settings
from ddpm_ext.integrations.diffusers.traced_rows import (
    CONFIG,
    READ_HERE,
    LoopDtypes,
    NoRows,
    TracedRows,
    contents_of,
    outside,
    replaced,
)
from ddpm_ext.integrations.fallback import Fallback, made_outside_autograd
from ddpm_ext.integrations.shared import new
from ddpm_ext.ops.extension import C
from ddpm_ext.tables.trace_run import changed, on_cpu
from ddpm_ext.tables.trace_watch import CONSTANT, MISSING, Watch, can_watch, copied

CALLED = 2  # loops that call it themselves, since to find out what it does costs more than ten such calls


class FirstInput(NamedTuple):
    """What scale_model_input does before a loop's first step.

    Attributes:
        function, others: it returns function(the sample, *others); the others are numbers, also in tensors.
        changes: the attributes that it sets.
        contents: of those that it reads, as `_kept` has them.
    """

    function: Callable[..., Tensor]
    others: tuple[Any, ...]
    changes: dict[str, Any]
    contents: dict[str, object]

    @classmethod
    def of(cls, scheduler: Any, timestep: Tensor, dims: int) -> FirstInput | None:
        """None where it does anything else.

        Args:
            scheduler: an object of diffusers' class, as it is before that call.
            timestep: the call's.
            dims: how many dimensions samples have.
        """
        if not can_watch(scheduler):
            return None
        watch = Watch()
        own, x = watch.copy(scheduler, torch.randn), torch.ones([1] * dims, device="cpu").as_subclass(_Sample)
        before = vars(own).copy()
        try:
            with on_cpu():
                function, (given, *others), options = own.scale_model_input(x, timestep).made_by
            found = {name: _kept(vars(scheduler).get(name, MISSING)) for name in watch.read() - {CONFIG}}
        except Exception:  # of its own code, or of a result that no operator made of the sample
            return None
        changes = changed(own, watch.loaded | before)
        are_numbers = all(type(y) in CONSTANT or (type(y) is Tensor and not y.dim()) for y in others)
        if given is not x or options or not are_numbers or not CONSTANT.issuperset(map(type, changes.values())):
            return None
        return cls(function, tuple(others), changes, found)


class _Sample(Tensor):
    """A sample that notes in what is computed of it by which function that was, and of what."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(found, _Sample):
            found.made_by = function, args, kwargs  # type: ignore[attr-defined]
        return found


class Begun(NamedTuple):
    """How an object's last loop began. One that begins alike has the same rows, or none for the same reason. Copies and
    pickles have none.

    Attributes:
        rows: the loop's.
        of_loop: its dtypes; None where it has no rows.
        call: of its steps, as Repeated has it.
        settings: those of `rows.scheduler`.
        levels, contents: of the attributes of `rows.scheduler` on which the rows hang, those of EDITED, and the others
            beside its config, as `_kept` has them.
        outside: what else they hang on.
        input: what scale_model_input does before a first step; None until it was called often enough, False where that
            is not known.
        called: how often it was.
    """

    rows: TracedRows | NoRows
    of_loop: LoopDtypes | None
    call: Any
    settings: Settings
    levels: dict[str, object]
    contents: dict[str, object]
    outside: tuple[Any, ...]
    input: FirstInput | Literal[False] | None = None
    called: int = 0

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(cls, rows: TracedRows | NoRows, of_loop: LoopDtypes | None, call: Any, settings: Settings) -> Begun | None:
        """None where nobody knows what the rows hang on, or without a call. settings: as the loop began."""
        read, began = rows.read, rows.scheduler
        if read is None or call is None:
            return None
        state, names = vars(began), read | READ_HERE
        levels = {name: state.get(name, MISSING) for name in EDITED if name in names}
        contents = {name: _kept(state.get(name, MISSING)) for name in names.difference(levels, [CONFIG])}
        return cls(rows, of_loop, call, settings, levels, contents, outside(type(began)))

    def is_for(self, scheduler: Any, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether a step with these arguments may begin such a loop, whatever the settings. No tensor is read."""
        if not self.call.has_kinds(args, options) or type(args[1]) is not Tensor or args[1].dim():
            return False
        return bool(scheduler._index_of(args[1]) == self.rows.first)  # noqa: SLF001 (of a Scheduler)

    def settings_of(self, scheduler: Any) -> Settings | None:
        """Those of a loop that it begins now, if that has the same rows; else None. No tensor on a GPU is read."""
        known = self.levels | self.contents
        return Settings.of(scheduler, self.settings) if self.is_alike(scheduler.__dict__, known) else None

    def is_alike(self, state: dict[str, Any], contents: Mapping[str, object]) -> bool:
        """Whether an object with these attributes has the methods and the config of the loop's, and these contents."""
        cls = type(self.rows.scheduler)
        if outside(cls) != self.outside or replaced(cls, state):
            return False
        try:
            if not C.unchanged(state, (), self.settings.attributes, self.settings.items):
                return False
        except ValueError:  # of arrays in the config
            return False
        return _has(state, contents)

    def with_input(self, before: Mapping[str, Any], timestep: Tensor) -> Begun:
        """The same once scale_model_input was called with this timestep, which later on tells `input`.

        before: the attributes before that call.
        """
        if self.called < CALLED:
            return self._replace(called=self.called + 1)
        scheduler = new(type(self.rows.scheduler))
        scheduler.__dict__.update(before)
        found = made_outside_autograd(FirstInput.of, scheduler, timestep, self.rows.key.dims)
        if not isinstance(found, FirstInput):
            return self._replace(input=False)
        levels = {name: x for name, x in self.levels.items() if name in found.contents}
        if not _has(before, levels):
            return self._replace(input=False)
        for name in levels:  # which nobody compares again
            del found.contents[name]
        return self._replace(input=found)

    def next_loop(self, scheduler: Any) -> NextLoop | None:
        """The one that a scheduler with new timesteps may begin; None where its levels are others, or on a GPU."""
        rows, state, found, levels = self.rows, scheduler.__dict__, self.input or None, self.levels
        if isinstance(rows, NoRows) or self.of_loop is None or not _has(state, levels):
            return None  # all else is looked at when it begins
        settings = Settings.of(scheduler, self.settings)
        call = self.call.following(scheduler.timesteps, settings.watched)
        loop = LoopPosition(rows, settings, repeated=Repeated(self.of_loop, call))
        uncounted = {name: levels[name] for name, _, count in settings.watched if count is None and name in levels}
        return NextLoop(self, loop, call, self.contents | uncounted, found.contents | uncounted if found else {})


class _Contents(NamedTuple):
    """contents_of an attribute."""

    key: object


def _kept(value: Any) -> object:
    """What `_has` compares an attribute with: nothing that the scheduler itself holds, which somebody may write to."""
    if value is MISSING or type(value) in CONSTANT:
        return value
    return copied(value) if type(value) is Tensor else _Contents(contents_of(value))


def _has(state: Mapping[str, Any], contents: Mapping[str, object]) -> bool:
    """Whether attributes have these contents. No tensor on a GPU is read."""
    try:
        return bool(C.has_contents(state, contents, _has_other))
    except (ValueError, Fallback):  # of what cannot be compared
        return False


def _has_other(state: Mapping[str, Any], name: str, known: object) -> bool:
    """_has of what the compiled module does not compare itself."""
    value = state.get(name, MISSING)
    if isinstance(value, Tensor) and not value.is_cpu:
        return False
    return contents_of(value) == (known.key if isinstance(known, _Contents) else contents_of(known))


class NextLoop(NamedTuple):
    """A loop that begins like the last one, unless something is edited first. Copies and pickles have none.

    Attributes:
        begun: the last one.
        loop: before its first step.
        call: of that, as Repeated has it; it tells whether tensors are the same that they were after set_timesteps.
        step, scaling: the contents of all other attributes on which the first step hangs, and scale_model_input before
            it.
    """

    begun: Begun
    loop: LoopPosition
    call: Any
    step: dict[str, object]
    scaling: dict[str, object]

    def __reduce__(self) -> Any:
        return type(None), ()

    def begins(self, state: dict[str, Any], args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether a step with these arguments, of an object with these attributes, is its first one."""
        return self.begun.is_alike(state, self.step) and bool(self.call.row_of(state, args, options) == 0)

    def asks(self, state: dict[str, Any], args: Sequence[Any]) -> bool:
        """Whether scale_model_input with these arguments, of an object with these attributes, is the call before the
        first step, and nobody knows yet what that does."""
        return bool(self.begun.input is None and len(args) == 2 and self.call.is_at(0, state, args[1]))

    def scaled(self, state: dict[str, Any], args: Sequence[Any], options: Mapping[str, Any]) -> Tensor | None:
        """What scale_model_input with these arguments returns before the first step, once it has changed the
        attributes; None where it is to be called itself."""
        found = self.begun.input
        if not found or options or len(args) != 2 or type(args[0]) is not Tensor:
            return None
        if not (self.begun.is_alike(state, self.scaling) and self.call.is_at(0, state, args[1])):
            return None
        state.update(found.changes)
        return found.function(args[0], *found.others)
