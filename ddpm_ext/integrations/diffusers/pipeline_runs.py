"""Runs of a pipeline of diffusers with the rows of step tables, which are left once they have been seen."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.diffusers.levels import OwnLevels, levels_of
from ddpm_ext.integrations.diffusers.pipeline import guidance_of_call, is_pipeline, pipeline_with
from ddpm_ext.integrations.diffusers.table_scheduler import TableScheduler, prediction_of, with_table
from ddpm_ext.integrations.diffusers.traced_classes import is_scheduler
from ddpm_ext.integrations.shared import peer_class
from ddpm_ext.tables.step_table import StepTable


class Left(Exception):
    """Raised within a scheduler's step to leave the pipeline."""


class Recorder(TableScheduler):
    """Takes rows up to `last`, and leaves the pipeline there.

    Attributes:
        samples: those where each row arrives, on the CPU.
        terms: what row `last` adds up: the clean sample that it predicts, the sample, and those of earlier rows.
    """

    last: int
    samples: list[Tensor]
    terms: list[Tensor]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        ring = self._ring
        result = super().step(model_output, timestep, sample, *args, **kwargs | {"return_dict": True})
        self.samples.append(result.prev_sample.cpu())
        if self.step_index == self.last + 1:
            self.terms = [x.cpu() for x in (result.pred_original_sample, sample, *ring)]
            raise Left
        return result if kwargs.get("return_dict", True) else tuple(result.values())


class Runs:
    """Runs of a pipeline that differ in their scheduler, their prompt and their seed alone.

    Attributes:
        scheduler: as the pipeline's own, of diffusers' class. name: the pipeline's class.
        prediction: our name of what its model predicts.
        guidance: the note of its calls' guidance; see guidance_of_call.
        calls: steps that were taken so far.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> None:
        own: Any = vars(pipe).get("scheduler") if is_pipeline(pipe) else None
        if not is_scheduler(type(own)) or isinstance(own, TableScheduler):
            raise TypeError(
                f"pipe is a {type(pipe).__name__} with the scheduler {type(own).__name__}, expected a pipeline of "
                "diffusers with a scheduler of diffusers"
            )
        self._pipe, self._prompts, self._call, self._own = pipe, prompts, call, own
        cls: Any = peer_class(type(own))
        self.scheduler = cls.from_config(own.config)
        self.name, self.prediction = type(pipe).__name__, prediction_of(own)
        self.guidance = guidance_of_call(pipe.__call__, **call)
        self.calls = 0
        self.on_call: Callable[..., object] = lambda _: None

    def levels(self, scheduler: Any, steps: int) -> OwnLevels:
        """Those that a scheduler of diffusers gives the pipeline for so many steps."""
        probe, given = copy.deepcopy(scheduler), {}
        set_timesteps = probe.set_timesteps

        @functools.wraps(set_timesteps)
        def note(*args: Any, **kwargs: Any) -> Any:
            given.update({name: value for name, value in kwargs.items() if name in ("sigmas", "mu")})
            return set_timesteps(*args, **kwargs)

        @functools.wraps(probe.step)
        def leave(*_: Any, **__: Any) -> Any:
            raise Left

        probe.set_timesteps, probe.step = note, leave
        self._run(probe, steps, 0)
        self._count(1)
        return levels_of(probe, {name: value for name, value in given.items() if value is not None})

    def record(self, table: StepTable, seed: int, last: int | None = None) -> Recorder:
        """A run with the rows of a table, up to `last`; None: all."""
        made = with_table(self._own, table, Acceleration(), Recorder)
        made.last, made.samples, made.terms = len(table) - 1 if last is None else last, [], []
        self._run(made, len(table), seed)
        self._count(made.last + 1)
        return made

    def _run(self, scheduler: Any, steps: int, seed: int) -> None:
        pipeline = pipeline_with(self._pipe, {id(self._own): scheduler})
        pipeline.set_progress_bar_config(disable=True)
        prompt = {"prompt": self._prompts[seed % len(self._prompts)]} if self._prompts else {}
        generator = torch.Generator("cpu").manual_seed(seed)
        with contextlib.suppress(Left):
            pipeline(**self._call, **prompt, num_inference_steps=steps, generator=generator)
            raise ValueError(f"the pipeline did not take {steps} steps by its scheduler's step")

    def _count(self, steps: int) -> None:
        self.calls += steps
        self.on_call(steps)
