"""tune_pipeline fits a step table for a pipeline of diffusers, in runs of the pipeline itself.

A run stops in the step of its scheduler when it has recorded the samples that the fit needs, so no latents are decoded.
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
from ddpm_ext.integrations.diffusers.levels import LoopLevels
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

NAMES = ("unipc", "dpmpp_2m", "deis")  # The fit is compared with these samplers and the pipeline's own scheduler.
POWERS = (1.0, 1.3, 1.7, 2.2)  # the powers of the spacing that are tried: larger ones place more timesteps near the end


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
    """Fits a step table of few steps for a pipeline of diffusers.

    In the same few steps, the table comes nearer to the samples of a loop of many steps than the pipeline's scheduler
    or a named sampler does. If no fit is nearer, the result is the table of the nearest scheduler or sampler.

    All runs use a copy of the pipeline with a different scheduler. The first runs record a teacher: the sampler "deis"
    in many steps, at the scheduler's levels. After this, the rows of the table are fitted by least squares, one after
    the other, each to the teacher's samples at the row's end. The rows begin at some of the teacher's timesteps: four
    spacings of these are tried, and the best fit counts. Runs with other seeds decide whether this fit or another table
    is nearest. This takes about 2 * teacher_steps + 2 * steps^2 + 10 * steps steps of the pipeline for each seed.

    Args:
        pipe: the pipeline, which is not changed. Its scheduler determines the model's prediction and the levels.
        prompts: the runs take these prompts in turn. Empty for a pipeline without an argument `prompt`.
        steps: calls of the model, from 2 to teacher_steps / 4.
        teacher_steps: at most the number of the scheduler's training timesteps.
        seeds: the number of runs to fit to. As many more runs are held out. Each run takes the memory of teacher_steps
            samples on the CPU.
        first_seed: the seed of the first run's generator. The other runs have the following seeds.
        progress: whether to show a progress bar on a terminal (if tqdm is installed).
        call: further arguments of the pipeline, as in the calls that will use the table, such as guidance_scale,
            height, num_images_per_prompt, batch_size and prompt_embeds.

    Returns:
        Tuned: its table is for `accelerate(pipe, table=tuned.table)`.

    Raises:
        TypeError: pipe is not a pipeline with a scheduler of diffusers.
        ValueError: an argument is out of range; `call` has num_inference_steps, timesteps, sigmas or generator; the
            levels or the prediction of the scheduler can't be found; the pipeline takes another number of steps than
            num_inference_steps; the teacher has not converged.

    Examples:
        >>> from diffusers import DDPMPipeline
        >>> pipe = DDPMPipeline(load_model("digits").unet, diffusers.DDPMScheduler())
        >>> tuned = tune_pipeline(pipe, steps=6, seeds=16, batch_size=16)  # doctest: +SKIP
        >>> fast = accelerate(pipe, table=tuned.table)  # doctest: +SKIP
    """
    steps = checks.integer("steps", steps, 2**20, "2^20", start=2)
    teacher_steps = checks.integer("teacher_steps", teacher_steps, 2**20, "2^20", start=4 * steps)
    seeds = checks.integer("seeds", seeds, 2**20, "2^20", start=1)
    refused_names = {"num_inference_steps", "timesteps", "sigmas", "generator"} & call.keys()
    if refused_names:
        raise ValueError(f"{', '.join(sorted(refused_names))} is given, but is chosen here")
    runs = Runs(pipe, [prompts] if isinstance(prompts, str) else list(prompts), call)
    fitted_to, held_out = (range(first_seed + i * seeds, first_seed + (i + 1) * seeds) for i in range(2))
    planned = 2 * seeds * teacher_steps + teacher_steps // 2 + 3
    planned += seeds * (len(POWERS) * steps * (steps + 1) // 2 + (2 * len(NAMES) + 2) * steps)
    with calls_bar(planned, "steps of the pipeline, about", progress) as runs.on_call:
        levels = runs.levels(_trailing(runs.scheduler) or runs.scheduler, teacher_steps)
        teacher = _table(runs, SAMPLER, levels.grid())
        nodes = {seed: runs.record(teacher, seed).samples for seed in (*fitted_to, *held_out)}
        fewer = runs.record(_table(runs, SAMPLER, levels.grid(slice(None, None, 2))), held_out[0]).samples[-1]
        advice = "more teacher_steps may help, or less guidance"
        teacher_error = converged(fewer, nodes[held_out[0]][-1], len(levels), advice)
        fits = [_fit(runs, levels, nodes, fitted_to, _spaced(len(levels), steps, power)) for power in POWERS]
        table = min(fits, key=lambda fit: fit[1])[0]
        errors = _errors(runs, table, nodes, held_out)
        fitting, names = runs.calls, []
        for (sampler, spacing), named_table in _named_tables(runs, levels, steps):
            named_errors = _errors(runs, named_table, nodes, held_out)
            named = Named(sampler=sampler, spacing=spacing, steps=steps, calls=steps, **vars(Errors.of(named_errors)))
            names.append((named, named_table, named_errors))
    names.sort(key=lambda entry: entry[0].error)
    fitted_error = typical(errors)
    fitted = fitted_error < names[0][0].error
    if not fitted:
        _, table, errors = names[0]
    report = Report(
        **vars(Errors.of(errors)),
        calls=steps,
        fitted=fitted,
        fitted_error=fitted_error,
        names=[named for named, _, _ in names],
        timesteps=table.timestep.tolist(),
        teacher=f"{len(levels)} steps of {SAMPLER}",
        teacher_error=teacher_error,
        seeds=len(errors),
        held_out=len(errors),
        model_calls=runs.calls,
        names_calls=runs.calls - fitting,
        batch=len(errors) // seeds,
    )
    return tuned(table, _notes(runs, fewer), report)


# ------------------------------------------------------------------------------------------------------------ tables


def _trailing(scheduler: Any) -> Any:
    """A scheduler with trailing timesteps, whose first timestep is the last timestep of training.

    None if `scheduler` has trailing timesteps already, or has no setting for the spacing.
    """
    if "timestep_spacing" not in scheduler.config or scheduler.config.timestep_spacing == "trailing":
        return None
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


def _table(runs: Runs, sampler: str, grid: Grid) -> StepTable:
    return SAMPLERS[sampler](grid, prediction=runs.prediction)


def _named_tables(runs: Runs, levels: LoopLevels, steps: int) -> Iterator[tuple[tuple[str, str], StepTable]]:
    """The tables of `steps` steps that the fit is compared with, each with its (sampler, spacing).

    The first table is of the scheduler itself, if it can be traced and has no noise: noise leads to different samples.
    The tables of the samplers NAMES follow, with the scheduler's spacing and with trailing timesteps. If neither
    spacing has `steps` levels, as with Runge-Kutta steps, NAMES get evenly spaced levels of the teacher.
    """
    scheduler_levels = runs.levels(runs.scheduler, steps)
    spacing = runs.scheduler.config.get("timestep_spacing", None) or "its own"
    trailing = _trailing(runs.scheduler)
    if len(scheduler_levels) == steps:
        with contextlib.suppress(ValueError):  # raised for a scheduler whose steps are no rows
            traced = StepTable.trace(runs.scheduler, steps, **scheduler_levels.set_timesteps_options)
            euler = _table(runs, "euler", scheduler_levels.grid())
            if len(traced) == steps and not (traced.s != 0).any():
                columns = {name: getattr(euler, name) for name in LEVELS}
                # Without notes: the levels determine the factor of the model's input, the config determines the clip.
                yield (type(runs.scheduler).__name__, spacing), replace(traced, notes={}, **columns)
    spacings = [(spacing, scheduler_levels)]
    if trailing is not None:
        spacings.append(("trailing", runs.levels(trailing, steps)))
        spacings = spacings[1:] if torch.equal(spacings[1][1].noise, scheduler_levels.noise) else spacings
    grids = [(name, spaced.grid()) for name, spaced in spacings if len(spaced) == steps]
    for name, grid in grids or [("even", levels.grid(_spaced(len(levels), steps, 1.0)))]:
        for sampler in NAMES:
            yield (sampler, name), _table(runs, sampler, grid)


def _spaced(levels: int, steps: int, power: float) -> list[int]:
    """The indices of the teacher's steps at which the steps of the fitted table begin.

    Step i of n begins where the share (1 - i / n)^power of the teacher's steps remains.
    """
    steps_at = [round(levels * (1 - (1 - step / steps) ** power)) for step in range(steps)]
    for step in range(1, steps):
        steps_at[step] = max(steps_at[step], steps_at[step - 1] + 1)
    return [min(at, levels - steps + step) for step, at in enumerate(steps_at)]


# --------------------------------------------------------------------------------------------------------------- fit


def _fit(
    runs: Runs, levels: LoopLevels, nodes: dict[int, list[Tensor]], seeds: Sequence[int], rows: list[int]
) -> tuple[StepTable, float]:
    """Fits a table whose rows begin at these steps of the teacher. Returns it with its typical error.

    Each row is fitted for the samples to which the previous rows lead, not for the teacher's samples, and so corrects
    the errors of the previous rows.
    """
    euler_table = _table(runs, "euler", levels.grid(rows))
    last_steps = [*(step - 1 for step in rows[1:]), len(levels) - 1]  # the teacher's last step within each row
    weights: list[Tensor] = []
    for row, step in enumerate(last_steps):
        table, equations, parts = with_weights(euler_table, weights), Equations(), []
        for seed in seeds:
            parts.append((runs.record(table, seed, row).terms, nodes[seed][step]))
            equations.add(*parts[-1])
        weights.append(equations.solve(euler_weights(euler_table, row, 2 + min(row, HISTORY))))
    ends = [
        (sum(w * x.double() for w, x in zip(weights[-1].tolist(), terms, strict=True)), end) for terms, end in parts
    ]
    return with_weights(euler_table, weights), typical(torch.cat([distance(x, end) for x, end in ends]))


def _errors(runs: Runs, table: StepTable, nodes: dict[int, list[Tensor]], seeds: Sequence[int]) -> Tensor:
    """The distance of each sample of a table from the teacher's sample."""
    return torch.cat([distance(runs.record(table, seed).samples[-1], nodes[seed][-1]) for seed in seeds])


def _notes(runs: Runs, samples: Tensor) -> dict[str, Any]:
    """The notes of the tuned table about the loops that it is for. samples: the samples of a run, (batch, ...)."""
    config = runs.scheduler.config
    clip, threshold = clip_of(config) if reads_clip_sample(runs.scheduler) else (None, None)
    return {
        "prediction": runs.prediction,
        "clip": clip if threshold is None else str(threshold),
        **runs.guidance,
        "shape": list(samples.shape[1:]),
        "pipeline": f"{runs.name} with {type(runs.scheduler).__name__}",
    }
