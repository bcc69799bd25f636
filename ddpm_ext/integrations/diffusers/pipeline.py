"""Pipelines of diffusers: the same class and the same modules, with all schedulers accelerated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.diffusers.traced import is_scheduler
from ddpm_ext.ops.noise import STREAM_REVERSE, STREAMS_REVERSE_MORE

STREAMS = (STREAM_REVERSE, *STREAMS_REVERSE_MORE)
BASES = {
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
}


def is_pipeline(obj: Any) -> bool:
    """Whether an object is one of diffusers' pipelines, modular ones included."""
    return any((base.__module__, base.__name__) in BASES for base in type(obj).__mro__)


def accelerated_pipeline(pipeline: Any, settings: Acceleration, accelerated: Callable[[Any, Acceleration], Any]) -> Any:
    """A copy of the pipeline whose schedulers, and those of pipelines in it, are accelerated.

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
    return pipeline_with(pipeline, copies)


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


def pipeline_with(pipeline: Any, copies: dict[int, Any]) -> Any:
    """A copy that holds `copies` in the place of the objects whose identities they have."""
    copied = copies[id(pipeline)] = copy.copy(pipeline)
    for name, value in _attributes(pipeline):
        if is_pipeline(value) and id(value) not in copies:
            pipeline_with(value, copies)
        if id(value) in copies:
            vars(copied)[name] = copies[id(value)]
        elif type(value) in (dict, list, set):  # a modular pipeline writes to those of its components
            vars(copied)[name] = copy.copy(value)
    return copied
