"""Tunes step tables to the model of a finished run, into the run's folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ddpm_ext.models import tuned
from ddpm_ext.models.folder import load_model, model_sha256
from ddpm_ext.ops.noise import Philox
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.training.load_run import TakesClassLabels, Trained, load
from ddpm_ext.training.network import known_kind
from ddpm_ext.tuning import Tuner

_SEEDS, _BATCH = 64, 32  # samples to fit to, and at most so many at a time


def tune_run(
    folder: Path,
    average: nn.Module,
    calls: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    report: Callable[[str], None],
) -> None:
    """Writes tables of so many calls to the folder, with the model's classes in turn and without guidance.

    Tables that were tuned to the folder's model stay. Where its model can't be tuned to, a line says why.

    Args:
        folder: where the model was written.
        average: the module with its weights, which stays as it is.
    """
    if known_kind(average) is not None:
        loaded = load_model(folder, device=device)
        trained = Trained(loaded.unet, loaded.settings, loaded.shape, loaded.classes, clip=loaded.clip)
        sha256 = model_sha256(loaded)
    else:
        trained = load(folder, copy.deepcopy(average), device=device)
        sha256 = trained.sha256()
    paths = {count: folder / tuned.FOLDER / tuned.table_name(count) for count in calls}
    missing = [count for count in calls if not _is_there(paths[count], sha256)]
    if not missing:
        return
    batch = min(batch_size, _BATCH)
    labels = None if trained.classes is None else trained.classes.model_kwargs(range(batch), device=device)
    tuner = Tuner(
        trained.settings.diffusion(),
        TakesClassLabels(trained.model),
        (batch, *trained.shape),
        clip_denoised=trained.clip,
        model_kwargs=labels,
        seeds=_SEEDS,
        rng=Philox(seed),
        progress=False,
    )
    report(
        f"tuning tables for {', '.join(map(str, missing))} calls, by at most {tuner.planned_calls(missing):,} of them"
    )
    try:
        for count in missing:
            found = tuner.tune(count)
            tuned.save_tuned(found.table, paths[count], model_sha256=sha256, seed=seed)
            best = found.report.best
            report(f"{paths[count]}: error {found.report.error:.4f}; that of {best}, {best.error:.4f}")
    except ValueError as error:  # the run itself is done
        report(f"not tuned: {error}")


def _is_there(path: Path, sha256: str) -> bool:
    try:
        return StepTable.load(path).notes.get(tuned.MODEL_SHA256) == sha256
    except (OSError, ValueError):
        return False
