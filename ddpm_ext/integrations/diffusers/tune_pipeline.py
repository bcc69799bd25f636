"""A step table for a pipeline of diffusers, fitted by running the pipeline as it is.

A run leaves the pipeline from within its scheduler's step, once that has seen what it needs: nothing is decoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import calls_bar
from ddpm_ext.integrations.diffusers.levels import OwnLevels
from ddpm_ext.integrations.diffusers.pipeline_runs import Runs
from ddpm_ext.integrations.diffusers.scheduler import clip_of, reads_clip_sample
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning import Named, Report, Tuned
from ddpm_ext.tuning.errors import Errors, distance, typical
from ddpm_ext.tuning.fit import HISTORY, Equations, euler_weights, with_weights
from ddpm_ext.tuning.teacher import SAMPLER, converged
from ddpm_ext.tuning.tuner import tuned

__all__ = ["tune_pipeline"]

NAMES = ("unipc", "dpmpp_2m", "deis")  # that the fit is compared with, beside the pipeline's own scheduler
POWERS = (1.0, 1.3, 1.7, 2.2)  # the larger, the more timesteps are near the end


def tune_pipeline(
    pipe: Any,
    prompts: str | Sequence[str] = (),
    *,
    steps: int = 6,
    teacher_steps: int = 100,
    seeds: int = 8,
    first_seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> Tuned:
    """A step table for a pipeline of diffusers, whose samples end nearer to those of many steps than the pipeline's own
    scheduler or a named sampler leads in as few; the best name's table where no fit is nearer.

    The pipeline is run as it is, with another scheduler in its place, and stays as it was. The first runs record a
    teacher: our "deis" in many steps at the scheduler's own levels. Then each row of the table is fitted by
    least squares to where the teacher is at the next timestep, once all runs have come to it. Timesteps are the
    teacher's, by the best of four powers. Other seeds tell which is nearest in the end. It takes about
    2 * teacher_steps + 2 * steps^2 + 10 * steps steps of the pipeline for each seed.

    Args:
        pipe: stays as it is. Its scheduler says what the model predicts, and which levels it has.
        prompts: a run takes the next of them in turn; none for a pipeline without `prompt`.
        steps: calls of the model, from 2 to teacher_steps / 4.
        teacher_steps: at most the scheduler's training timesteps.
        seeds: runs to fit to; as many others are held out. Each takes the memory of teacher_steps samples on the CPU.
        first_seed: of the first run's generator; the others have the next ones.
        progress: whether to show a progress bar on a terminal (where tqdm is installed).
        call: further arguments of the pipeline, as in the calls that will take the table: guidance_scale, height,
            num_images_per_prompt, batch_size, prompt_embeds and the like.

    Returns:
        Tuned: its table is for `accelerate(pipe, table=tuned.table)`.

    Raises:
        TypeError: pipe is no pipeline with a scheduler of diffusers.
        ValueError: an argument is out of range, a scheduler that does not tell its levels or prediction, or a teacher
            that has not converged.

    Examples:
        >>> from diffusers import DDPMPipeline
        >>> pipe = DDPMPipeline(load_model("digits").unet, diffusers.DDPMScheduler())
        >>> tuned = tune_pipeline(pipe, steps=6, seeds=16, batch_size=16)  # doctest: +SKIP
        >>> fast = accelerate(pipe, table=tuned.table)  # doctest: +SKIP
    """
    steps = checks.integer("steps", steps, 2**20, "2^20", start=2)
    teacher_steps = checks.integer("teacher_steps", teacher_steps, 2**20, "2^20", start=4 * steps)
    seeds = checks.integer("seeds", seeds, 2**20, "2^20", start=1)
    refused = {"num_inference_steps", "timesteps", "sigmas", "generator"} & call.keys()
    if refused:
        raise ValueError(f"{', '.join(sorted(refused))} is given, but is chosen here")
    runs = Runs(pipe, [prompts] if isinstance(prompts, str) else list(prompts), call)
    fitted_to, held_out = (range(first_seed + i * seeds, first_seed + (i + 1) * seeds) for i in range(2))
    planned = 2 * seeds * teacher_steps + teacher_steps // 2 + 3
    planned += seeds * (len(POWERS) * steps * (steps + 1) // 2 + (2 * len(NAMES) + 2) * steps)
    with calls_bar(planned, "steps of the pipeline, about", progress) as runs.on_call:
        levels = runs.levels(_trailing(runs.scheduler) or runs.scheduler, teacher_steps)
        teacher = _made(runs, SAMPLER, levels.grid())
        nodes = {seed: runs.record(teacher, seed).samples for seed in (*fitted_to, *held_out)}
        fewer = runs.record(_made(runs, SAMPLER, levels.grid(slice(None, None, 2))), held_out[0]).samples[-1]
        advice = "more teacher_steps may help, or less guidance"
        teacher_error = converged(fewer, nodes[held_out[0]][-1], len(levels), advice)
        fits = [_fit(runs, levels, nodes, fitted_to, _spaced(len(levels), steps, power)) for power in POWERS]
        table = min(fits, key=lambda fit: fit[1])[0]
        own = _errors(runs, table, nodes, held_out)
        fitting, names = runs.calls, []
        for (sampler, spacing), other in _named_tables(runs, levels, steps):
            far = _errors(runs, other, nodes, held_out)
            named = Named(sampler=sampler, spacing=spacing, steps=steps, calls=steps, **vars(Errors.of(far)))
            names.append((named, other, far))
    names.sort(key=lambda each: each[0].error)
    fitted_error = typical(own)
    fitted = fitted_error < names[0][0].error
    if not fitted:
        _, table, own = names[0]
    report = Report(
        **vars(Errors.of(own)),
        calls=steps,
        fitted=fitted,
        fitted_error=fitted_error,
        names=[each for each, _, _ in names],
        timesteps=table.timestep.tolist(),
        teacher=f"{len(levels)} steps of {SAMPLER}",
        teacher_error=teacher_error,
        seeds=len(own),
        held_out=len(own),
        model_calls=runs.calls,
        names_calls=runs.calls - fitting,
        batch=len(own) // seeds,
    )
    return tuned(table, _notes(runs, fewer), report)


# ------------------------------------------------------------------------------------------------------------ tables


def _trailing(scheduler: Any) -> Any:
    """The scheduler over trailing timesteps, from the last of training; None where it has these or no choice."""
    if "timestep_spacing" not in scheduler.config or scheduler.config.timestep_spacing == "trailing":
        return None
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


def _made(runs: Runs, sampler: str, grid: Grid) -> StepTable:
    return SAMPLERS[sampler](grid, prediction=runs.prediction)


def _named_tables(runs: Runs, levels: OwnLevels, steps: int) -> Iterator[tuple[tuple[str, str], StepTable]]:
    """The scheduler's own rows and those of NAMES, by the scheduler's own spacing and by trailing, in so many steps;
    where both have other numbers of levels, as with Runge-Kutta steps, at even ones of the teacher's. Rows with noise
    are left out: they end at other samples."""
    own = runs.levels(runs.scheduler, steps)
    spacing = runs.scheduler.config.get("timestep_spacing", None) or "its own"
    trailing = _trailing(runs.scheduler)
    if len(own) == steps:
        with contextlib.suppress(ValueError):  # what is no rows
            traced = StepTable.trace(runs.scheduler, steps, **own.given)
            euler = _made(runs, "euler", own.grid())
            if len(traced) == steps and not (traced.s != 0).any():
                known = {name: getattr(euler, name) for name in LEVELS}
                yield (type(runs.scheduler).__name__, spacing), replace(traced, **known)
    every = [(spacing, own)]
    if trailing is not None:
        every.append(("trailing", runs.levels(trailing, steps)))
        every = every[1:] if torch.equal(every[1][1].noise, own.noise) else every
    grids = [(name, each.grid()) for name, each in every if len(each) == steps]
    for name, grid in grids or [("even", levels.grid(_spaced(len(levels), steps, 1.0)))]:
        for sampler in NAMES:
            yield (sampler, name), _made(runs, sampler, grid)


def _spaced(levels: int, steps: int, power: float) -> list[int]:
    """The teacher's steps at which a student's begin: the shares that remain are powers of evenly spaced ones."""
    steps_at = [round(levels * (1 - (1 - step / steps) ** power)) for step in range(steps)]
    for step in range(1, steps):
        steps_at[step] = max(steps_at[step], steps_at[step - 1] + 1)
    return [min(at, levels - steps + step) for step, at in enumerate(steps_at)]


# --------------------------------------------------------------------------------------------------------------- fit


def _fit(
    runs: Runs, levels: OwnLevels, nodes: dict[int, list[Tensor]], seeds: Sequence[int], rows: list[int]
) -> tuple[StepTable, float]:
    """The rows that begin at these steps of the teacher, and their mean error.

    Each row starts where the rows before it arrive, and not where the teacher is, so that it corrects them.
    """
    base = _made(runs, "euler", levels.grid(rows))
    arrives = [*(at - 1 for at in rows[1:]), len(levels) - 1]  # the teacher's step that arrives there
    weights: list[Tensor] = []
    for row, at in enumerate(arrives):
        table, equations, parts = with_weights(base, weights), Equations(), []
        for seed in seeds:
            parts.append((runs.record(table, seed, row).terms, nodes[seed][at]))
            equations.add(*parts[-1])
        weights.append(equations.solve(euler_weights(base, row, 2 + min(row, HISTORY))))
    ends = [(sum(w * x.double() for w, x in zip(weights[-1].tolist(), own, strict=True)), end) for own, end in parts]
    return with_weights(base, weights), typical(torch.cat([distance(x, end) for x, end in ends]))


def _errors(runs: Runs, table: StepTable, nodes: dict[int, list[Tensor]], seeds: Sequence[int]) -> Tensor:
    """How far each sample ends from the teacher's."""
    return torch.cat([distance(runs.record(table, seed).samples[-1], nodes[seed][-1]) for seed in seeds])


def _notes(runs: Runs, samples: Tensor) -> dict[str, Any]:
    config = runs.scheduler.config
    clip, threshold = clip_of(config) if reads_clip_sample(runs.scheduler) else (None, None)
    return {
        "prediction": runs.prediction,
        "clip": clip if threshold is None else str(threshold),
        **runs.guidance,
        "shape": list(samples.shape[1:]),
        "pipeline": f"{runs.name} with {type(runs.scheduler).__name__}",
    }
