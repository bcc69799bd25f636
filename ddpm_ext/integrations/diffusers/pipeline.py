"""Pipelines of diffusers: a subclass with the same modules, whose schedulers are all accelerated, and stay so."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.diffusers.start_noise import start_noise
from ddpm_ext.integrations.diffusers.traced_classes import is_scheduler
from ddpm_ext.integrations.shared import Accelerated, make_class, new, peer_class, peer_method, shown
from ddpm_ext.loop.notes import check_note
from ddpm_ext.ops.noise import STREAM_REVERSE, STREAMS_REVERSE_MORE
from ddpm_ext.tables.step_table import StepTable

Accelerate = Callable[[Any, Acceleration], Any]
STREAMS = (STREAM_REVERSE, *STREAMS_REVERSE_MORE)
STEPS = "num_inference_steps"
BASES = {
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
}


def is_pipeline(obj: Any) -> bool:
    """Whether an object is one of diffusers' pipelines, modular ones included."""
    return any((base.__module__, base.__name__) in BASES for base in type(obj).__mro__)


class Pipeline(Accelerated):
    """Mixin placed before a pipeline's class in the bases."""

    library = "diffusers"
    replaces = ()
    accelerate_scheduler: ClassVar[Accelerate]  # of one that is put in another's place; set where accelerate() is

    def __init_subclass__(cls) -> None:
        """Replaces __call__, with the signature of the peer's own, where there is one."""
        super().__init_subclass__()
        mro = getattr(vars(cls).get("_peer"), "__mro__", ())
        own: Any = next((vars(base)["__call__"] for base in mro if "__call__" in vars(base)), None)
        if own is None:
            return

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            table = getattr(vars(self).get("scheduler"), "table", None)
            if isinstance(table, StepTable):
                for name, found in guidance_of_call(own, self, *args, **kwargs).items():
                    check_note(table, name, found, "the pipeline's call has")
                kwargs = {**_steps_of(table, own, self, *args, **kwargs), **kwargs}
            with start_noise(self, [each.accelerated for each in _accelerated_schedulers(self)]):
                return own(self, *args, **kwargs)

        cls.__call__ = call  # type: ignore[method-assign]

    @property
    def accelerated(self) -> Acceleration:
        """The settings of its first scheduler, which is `scheduler` where it has one of that name."""
        return next((own.accelerated for own in _accelerated_schedulers(self)), super().accelerated)

    def __setattr__(self, name: str, value: Any) -> None:
        """A scheduler of diffusers is accelerated as the one was whose place it takes.

        `pipeline.scheduler = X.from_config(pipeline.scheduler.config)` stands in every guide, and X makes plain ones.
        """
        reason, replaced = None, vars(self).get(name)
        self._note_end_of(replaced)
        is_new = "_acceleration" not in vars(value) if isinstance(value, Accelerated) else True  # made by its class
        if is_scheduler(type(value)) and is_new:
            settings = self._settings_in_place_of(replaced)
            try:
                value = type(self).accelerate_scheduler(value, settings)
            except TypeError as refused:
                reason = str(refused)
        super().__setattr__(name, value)
        if reason is not None:
            self.accelerated.record_fallback(self.library, name, reason)

    def __delattr__(self, name: str) -> None:
        """One that is set later goes on where a deleted scheduler stood."""
        self._note_end_of(vars(self).get(name))
        super().__delattr__(name)

    def _note_end_of(self, replaced: Any) -> None:
        """Keeps a scheduler's settings for one that comes later, also after None."""
        if is_scheduler(type(replaced)) and isinstance(replaced, Accelerated):
            vars(self)["_acceleration"] = replaced.accelerated.continued()

    def __repr__(self) -> str:
        """Lines for its schedulers, then the peer's own."""
        return "\n".join([*map(shown, _accelerated_schedulers(self)), peer_method(self, "__repr__")()])

    def _settings_in_place_of(self, replaced: Any) -> Acceleration:
        if isinstance(replaced, Accelerated):
            return replaced.accelerated.continued()
        settings = self.accelerated
        used = {own.accelerated.stream for own in _accelerated_schedulers(self)}
        if not used:
            return settings.continued()
        unused = [stream for stream in STREAMS if stream not in used]
        return settings.of_stream(unused[0] if unused and settings.noise == "philox" else STREAM_REVERSE)


def guidance_of_call(call: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The note "guidance" of a call of a pipeline: its guidance_scale, or None for 1. Empty where no argument says it.

    call: the pipeline's own method, also a bound one.
    """
    given = _arguments(call, *args, **kwargs)
    if given is None:
        return {}
    given.apply_defaults()
    scale = given.arguments.get("guidance_scale", None)
    is_number = isinstance(scale, int | float)
    if "guidance_scale" not in given.arguments or not (is_number or scale is None):
        return {}
    return {"guidance": None if scale in (None, 1) else float(scale)}


def _steps_of(table: StepTable, call: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """num_inference_steps of a call of a pipeline that takes this table: its rows, where the call says none."""
    given = _arguments(call, *args, **kwargs)
    is_left_out = given is not None and STEPS in given.signature.parameters and STEPS not in given.arguments
    return {STEPS: len(table)} if is_left_out else {}


def _arguments(call: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments | None:
    """Those of a call by their names; None where it will raise a TypeError itself."""
    try:
        return inspect.signature(call).bind_partial(*args, **kwargs)
    except TypeError:
        return None


def _accelerated_schedulers(pipeline: Any) -> Iterator[Any]:
    return (scheduler for scheduler in _schedulers(pipeline, set()) if isinstance(scheduler, Accelerated))


def _restore(peer: type) -> Any:
    """What pickle calls: an accelerated pipeline without its state."""
    return new(make_class(Pipeline, peer, peer, _restore))


def accelerated_pipeline(pipeline: Any, settings: Acceleration, accelerated: Accelerate) -> Any:
    """A copy, of a subclass of the pipeline's class, whose schedulers and those of pipelines in it are accelerated.

    What the pipeline holds twice, its copy holds twice. With noise "philox", the attribute `scheduler` has the noise of
    a scheduler alone, and each of the others, in the order of their names, a stream of its own.

    Args:
        settings: those of every scheduler, apart from the stream.
        accelerated: makes the accelerated scheduler of a scheduler and its settings.

    Raises:
        TypeError: it has no scheduler.
        ValueError: it has more schedulers than there are streams.
    """
    schedulers = {id(scheduler): scheduler for scheduler in _schedulers(pipeline, set())}
    if not schedulers:
        raise TypeError(
            f"obj is a {type(pipeline).__name__} without a scheduler, expected one (a modular pipeline has its "
            "components after load_components)"
        )
    if settings.noise == "philox" and len(schedulers) > len(STREAMS):
        raise ValueError(f"obj has {len(schedulers)} schedulers, expected at most {len(STREAMS)} with noise 'philox'")
    copies = {}
    for number, (key, scheduler) in enumerate(schedulers.items()):
        own = settings.of_stream(STREAMS[number] if settings.noise == "philox" else STREAM_REVERSE)
        copies[key] = accelerated(scheduler, own)

    def copied(each: Any) -> Any:
        made = _restore(peer_class(type(each)))
        vars(made).update(vars(each), _acceleration=settings)
        return made

    return pipeline_with(pipeline, copies, copied)


def _attributes(pipeline: Any) -> list[tuple[str, Any]]:
    """`scheduler` first, then by name, and pipelines last."""
    return sorted(vars(pipeline).items(), key=lambda item: (is_pipeline(item[1]), item[0] != "scheduler", item[0]))


def _schedulers(pipeline: Any, seen: set[int]) -> Iterator[Any]:
    seen.add(id(pipeline))
    for _, value in _attributes(pipeline):
        if is_scheduler(type(value)):
            yield value
        elif is_pipeline(value) and id(value) not in seen:  # the combined pipelines of Kandinsky and StableCascade
            yield from _schedulers(value, seen)


def pipeline_with(pipeline: Any, copies: dict[int, Any], copied_of: Callable[[Any], Any] = copy.copy) -> Any:
    """A copy that holds `copies` in the place of the objects whose identities they have.

    copied_of: makes the copies of the pipeline and of those in it.
    """
    copied = copies[id(pipeline)] = copied_of(pipeline)
    for name, value in _attributes(pipeline):
        if is_pipeline(value) and id(value) not in copies:
            pipeline_with(value, copies, copied_of)
        if id(value) in copies:
            vars(copied)[name] = copies[id(value)]
        elif type(value) in (dict, list, set):  # a modular pipeline writes to those of its components
            vars(copied)[name] = copy.copy(value)
    return copied
