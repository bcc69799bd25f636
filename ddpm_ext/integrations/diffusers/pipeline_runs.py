"""Runs a pipeline of diffusers with the rows of step tables. A run stops after the last row that it needs."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.diffusers.levels import LoopLevels, levels_of
from ddpm_ext.integrations.diffusers.pipeline import guidance_of_call, is_pipeline, pipeline_with
from ddpm_ext.integrations.diffusers.table_scheduler import TableScheduler, prediction_of, with_table
from ddpm_ext.integrations.diffusers.traced_classes import is_scheduler
from ddpm_ext.integrations.shared import peer_class
from ddpm_ext.tables.step_table import StepTable


class StopPipeline(Exception):
    """Raised within a scheduler's step to stop the pipeline."""


class Recorder(TableScheduler):
    """Takes the rows up to `last`, then stops the pipeline.

    Attributes:
        samples: the result of each row, on the CPU.
        terms: the tensors that row `last` adds up, on the CPU: its predicted clean sample, its sample, and the tensors
            that earlier rows stored.
    """

    last: int
    samples: list[Tensor]
    terms: list[Tensor]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        history = self._history
        result = super().step(model_output, timestep, sample, *args, **kwargs | {"return_dict": True})
        self.samples.append(result.prev_sample.cpu())
        if self.step_index == self.last + 1:
            self.terms = [x.cpu() for x in (result.pred_original_sample, sample, *history)]
            raise StopPipeline
        return result if kwargs.get("return_dict", True) else tuple(result.values())


class Runs:
    """Runs of a pipeline that differ only in their scheduler, prompt, seed and number of steps.

    Args:
        pipe: the pipeline, which is not changed.
        prompts: the run with seed i takes prompt i modulo the number of prompts. Empty to pass no prompt.
        call: the other arguments of the pipeline's calls.

    Attributes:
        scheduler: a new scheduler of diffusers' class with the config of the pipeline's scheduler.
        name: the name of the pipeline's class.
        prediction: ddpm_ext's name of the model's prediction.
        guidance: the note about the guidance of the pipeline's calls, see guidance_of_call.
        calls: the number of steps that all runs have taken so far.
        on_call: a function that is called with the number of steps of each run, for a progress bar.

    Raises:
        TypeError: pipe is no pipeline of diffusers with a scheduler of diffusers.
        ValueError: the scheduler's config does not have the model's prediction.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> None:
        scheduler: Any = vars(pipe).get("scheduler") if is_pipeline(pipe) else None
        if not is_scheduler(type(scheduler)) or isinstance(scheduler, TableScheduler):
            raise TypeError(
                f"pipe is a {type(pipe).__name__} with the scheduler {type(scheduler).__name__}, expected a pipeline "
                "of diffusers with a scheduler of diffusers"
            )
        self._pipe, self._prompts, self._call, self._scheduler = pipe, prompts, call, scheduler
        cls: Any = peer_class(type(scheduler))
        self.scheduler = cls.from_config(scheduler.config)
        self.name, self.prediction = type(pipe).__name__, prediction_of(scheduler)
        self.guidance = guidance_of_call(pipe.__call__, **call)
        self.calls = 0
        self.on_call: Callable[..., object] = lambda _: None

    def levels(self, scheduler: Any, steps: int) -> LoopLevels:
        """The levels of the pipeline's loop of `steps` steps with this scheduler.

        The pipeline runs up to its first step, which calls the model once.
        """
        probe, options = copy.deepcopy(scheduler), {}
        set_timesteps = probe.set_timesteps

        @functools.wraps(set_timesteps)
        def set_timesteps_and_record(*args: Any, **kwargs: Any) -> Any:
            options.update({name: value for name, value in kwargs.items() if name in ("sigmas", "mu")})
            return set_timesteps(*args, **kwargs)

        @functools.wraps(probe.step)
        def stop(*_: Any, **__: Any) -> Any:
            raise StopPipeline

        probe.set_timesteps, probe.step = set_timesteps_and_record, stop
        self._run(probe, steps, 0)
        self._count(1)
        return levels_of(probe, {name: value for name, value in options.items() if value is not None})

    def record(self, table: StepTable, seed: int, last: int | None = None) -> Recorder:
        """Runs the pipeline with the rows of a table up to row `last`, by default all rows. Returns its Recorder."""
        recorder = with_table(self._scheduler, table, Acceleration(), Recorder)
        recorder.last, recorder.samples, recorder.terms = len(table) - 1 if last is None else last, [], []
        self._run(recorder, len(table), seed)
        self._count(recorder.last + 1)
        return recorder

    def _run(self, scheduler: Any, steps: int, seed: int) -> None:
        pipeline = pipeline_with(self._pipe, {id(self._scheduler): scheduler})
        pipeline.set_progress_bar_config(disable=True)
        prompt = {"prompt": self._prompts[seed % len(self._prompts)]} if self._prompts else {}
        generator = torch.Generator("cpu").manual_seed(seed)
        with contextlib.suppress(StopPipeline):
            pipeline(**self._call, **prompt, num_inference_steps=steps, generator=generator)
            raise ValueError(f"the pipeline did not take {steps} steps by its scheduler's step")

    def _count(self, steps: int) -> None:
        self.calls += steps
        self.on_call(steps)
