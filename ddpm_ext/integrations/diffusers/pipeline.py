"""Accelerated pipelines of diffusers. All schedulers of a pipeline are accelerated, also those that are set later."""

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
    """The mixin for a pipeline's class. An accelerated class derives from both, the mixin first."""

    library = "diffusers"
    replaces = ()
    # Accelerates a scheduler that is set later. integrations/__init__.py assigns the function and imports this file, so
    # this file can't import the function.
    accelerate_scheduler: ClassVar[Accelerate]

    def __init_subclass__(cls) -> None:
        """Replaces the library's __call__, if it has one, by a method with the same signature.

        The method also begins the loops of the schedulers' noise. If `scheduler` has a step table, it compares the
        guidance with the table's notes, and a call without a number of steps takes as many as the table has rows.
        """
        super().__init_subclass__()
        mro = getattr(vars(cls).get("_peer"), "__mro__", ())
        peers_call: Any = next((vars(base)["__call__"] for base in mro if "__call__" in vars(base)), None)
        if peers_call is None:
            return

        @functools.wraps(peers_call)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            table = getattr(vars(self).get("scheduler"), "table", None)
            if isinstance(table, StepTable):
                for name, guidance in guidance_of_call(peers_call, self, *args, **kwargs).items():
                    check_note(table, name, guidance, "the pipeline's call has")
                kwargs = {**_steps_of(table, peers_call, self, *args, **kwargs), **kwargs}
            with start_noise(self, [scheduler.accelerated for scheduler in _accelerated_schedulers(self)]):
                return peers_call(self, *args, **kwargs)

        cls.__call__ = call  # type: ignore[method-assign]

    @property
    def accelerated(self) -> Acceleration:
        """The settings of the pipeline's first scheduler: its attribute `scheduler`, if it has one.

        Without an accelerated scheduler, these are the settings for the next scheduler that is set.
        """
        return next((scheduler.accelerated for scheduler in _accelerated_schedulers(self)), super().accelerated)

    def __setattr__(self, name: str, value: Any) -> None:
        """Accelerates a scheduler that is set, with the settings of the scheduler that it replaces.

        The usual way to change the scheduler is `pipeline.scheduler = X.from_config(pipeline.scheduler.config)`, where
        X is a class of diffusers, not an accelerated one.
        """
        reason, previous = None, vars(self).get(name)
        self._store_settings_of(previous)
        # A scheduler that was created by calling an accelerated class, not by accelerate(), has no settings yet.
        is_new = "_acceleration" not in vars(value) if isinstance(value, Accelerated) else True
        if is_scheduler(type(value)) and is_new:
            settings = self._settings_in_place_of(previous)
            try:
                value = type(self).accelerate_scheduler(value, settings)
            except TypeError as refused:
                reason = str(refused)
        super().__setattr__(name, value)
        if reason is not None:
            self.accelerated.record_fallback(self.library, name, reason)

    def __delattr__(self, name: str) -> None:
        """Deletes an attribute. The settings of a deleted scheduler are stored for the next scheduler that is set."""
        self._store_settings_of(vars(self).get(name))
        super().__delattr__(name)

    def _store_settings_of(self, previous: Any) -> None:
        """Stores the settings of a scheduler that is replaced or deleted.

        The next scheduler gets them, even if the attribute is None in the meantime.
        """
        if is_scheduler(type(previous)) and isinstance(previous, Accelerated):
            vars(self)["_acceleration"] = previous.accelerated.continued()

    def __repr__(self) -> str:
        """One line for each accelerated scheduler, then the library's own text."""
        return "\n".join([*map(shown, _accelerated_schedulers(self)), peer_method(self, "__repr__")()])

    def _settings_in_place_of(self, previous: Any) -> Acceleration:
        if isinstance(previous, Accelerated):
            return previous.accelerated.continued()
        settings = self.accelerated
        used = {scheduler.accelerated.stream for scheduler in _accelerated_schedulers(self)}
        if not used:
            return settings.continued()
        unused = [stream for stream in STREAMS if stream not in used]
        return settings.of_stream(unused[0] if unused and settings.noise == "philox" else STREAM_REVERSE)


def guidance_of_call(call: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """{"guidance": the guidance_scale of a pipeline's call}, as in a step table's notes: None for a scale of 1 or None.

    The dict is empty if the pipeline has no argument guidance_scale, or if the argument is neither a number nor None.

    Args:
        call: the pipeline class's __call__, bound or not.
    """
    bound = _arguments(call, *args, **kwargs)
    if bound is None:
        return {}
    bound.apply_defaults()
    scale = bound.arguments.get("guidance_scale", None)
    is_number = isinstance(scale, int | float)
    if "guidance_scale" not in bound.arguments or not (is_number or scale is None):
        return {}
    return {"guidance": None if scale in (None, 1) else float(scale)}


def _steps_of(table: StepTable, call: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """num_inference_steps for a pipeline's call without this argument: the number of the table's rows."""
    bound = _arguments(call, *args, **kwargs)
    is_left_out = bound is not None and STEPS in bound.signature.parameters and STEPS not in bound.arguments
    return {STEPS: len(table)} if is_left_out else {}


def _arguments(call: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments | None:
    """The arguments of a call by name; None for arguments that the call will reject with a TypeError."""
    try:
        return inspect.signature(call).bind_partial(*args, **kwargs)
    except TypeError:
        return None


def _accelerated_schedulers(pipeline: Any) -> Iterator[Any]:
    return (scheduler for scheduler in _schedulers(pipeline, set()) if isinstance(scheduler, Accelerated))


def _restore(peer: type) -> Any:
    """An accelerated pipeline without state, for pickle."""
    return new(make_class(Pipeline, peer, peer, _restore))


def accelerated_pipeline(pipeline: Any, settings: Acceleration, accelerated: Accelerate) -> Any:
    """A copy of a pipeline, of a subclass of its class, with all schedulers accelerated, also those of inner pipelines.

    Two attributes that are the same object are the same object in the copy, too. With noise "philox", the attribute
    `scheduler` has the stream of a scheduler without a pipeline. Each other scheduler has a stream of its own, in the
    order of the schedulers' names.

    Args:
        settings: the settings of every scheduler, apart from the stream.
        accelerated: returns the accelerated scheduler for a scheduler and its settings.

    Raises:
        TypeError: the pipeline has no scheduler.
        ValueError: the pipeline has more schedulers than there are streams.
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
        settings_of_stream = settings.of_stream(STREAMS[number] if settings.noise == "philox" else STREAM_REVERSE)
        copies[key] = accelerated(scheduler, settings_of_stream)

    def accelerated_copy(original: Any) -> Any:
        pipeline_copy = _restore(peer_class(type(original)))
        vars(pipeline_copy).update(vars(original), _acceleration=settings)
        return pipeline_copy

    return pipeline_with(pipeline, copies, accelerated_copy)


def _attributes(pipeline: Any) -> list[tuple[str, Any]]:
    """The attributes of a pipeline: `scheduler` first, then the others by name, and inner pipelines last."""
    return sorted(vars(pipeline).items(), key=lambda item: (is_pipeline(item[1]), item[0] != "scheduler", item[0]))


def _schedulers(pipeline: Any, seen: set[int]) -> Iterator[Any]:
    seen.add(id(pipeline))
    for _, value in _attributes(pipeline):
        if is_scheduler(type(value)):
            yield value
        elif is_pipeline(value) and id(value) not in seen:  # the combined pipelines of Kandinsky and StableCascade
            yield from _schedulers(value, seen)


def pipeline_with(pipeline: Any, copies: dict[int, Any], copied_of: Callable[[Any], Any] = copy.copy) -> Any:
    """A copy of a pipeline in which some objects are replaced.

    Args:
        copies: {id of an object: its replacement}. Receives the copies of the pipeline and of inner pipelines.
        copied_of: returns the copy of a pipeline.
    """
    pipeline_copy = copies[id(pipeline)] = copied_of(pipeline)
    for name, value in _attributes(pipeline):
        if is_pipeline(value) and id(value) not in copies:
            pipeline_with(value, copies, copied_of)
        if id(value) in copies:
            vars(pipeline_copy)[name] = copies[id(value)]
        elif type(value) in (dict, list, set):  # a modular pipeline writes to the containers of its components
            vars(pipeline_copy)[name] = copy.copy(value)
    return pipeline_copy
