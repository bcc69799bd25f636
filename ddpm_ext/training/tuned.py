"""Tunes step tables to the model of a finished run, and writes them to the run's folder."""

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

_SEEDS, _BATCH = 64, 32  # the number of samples to which a table is fitted, and the largest batch


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
    """Tunes step tables to the model of a run, and writes them to the run's folder.

    Tuning uses no guidance, and all classes of the model in turn. A table that was tuned to this model before is kept.
    If tables can't be tuned to the model, `report` gets a line that says why.

    Args:
        folder: the folder to which the model was written.
        average: the module with the model's weights. It stays unchanged.
        calls: the number of model calls of each table.
        seed: the seed of the samples to which the tables are fitted.
        batch_size: the run's. Tuning has batches of this size, but of at most 32 samples.
        device: the device of the tuning.
        report: called with lines of text.
    """
    if known_kind(average) is not None:
        loaded = load_model(folder, device=device)
        trained = Trained(loaded.unet, loaded.settings, loaded.shape, loaded.classes, clip=loaded.clip)
        sha256 = model_sha256(loaded)
    else:
        trained = load(folder, copy.deepcopy(average), device=device)
        sha256 = trained.sha256()
    paths = {count: folder / tuned.FOLDER / tuned.table_name(count) for count in calls}
    missing = [count for count in calls if not _is_tuned(paths[count], sha256)]
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
            result = tuner.tune(count)
            tuned.save_tuned(result.table, paths[count], model_sha256=sha256, seed=seed)
            best = result.report.best
            report(f"{paths[count]}: error {result.report.error:.4f}; that of {best}, {best.error:.4f}")
    except ValueError as error:  # only reported, since the training itself has succeeded
        report(f"not tuned: {error}")


def _is_tuned(path: Path, sha256: str) -> bool:
    """Whether the file is a step table that was tuned to the model with this hash."""
    try:
        return StepTable.load(path).notes.get(tuned.MODEL_SHA256) == sha256
    except (OSError, ValueError):
        return False
