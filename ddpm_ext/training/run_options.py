"""The inputs of a run: its options, and the other inputs on which its weights depend. options.json has both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ddpm_ext.base import files
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.training import checkpoints, network
from ddpm_ext.training.data import ImageSource, Labels, Latents
from ddpm_ext.training.data.source import digest
from ddpm_ext.training.options import TrainOptions

OPTIONS = "options.json"
# Keys in the dict that inputs_of returns. MODEL_PREFIX is the prefix of the entries that describe the model.
SHAPE = "the shape of images"
LATENTS = "the images are latents"
MODEL_PREFIX = "model's "


def settings_from(options: TrainOptions) -> DiffusionSettings:
    """The settings of the diffusion that the options describe."""
    return DiffusionSettings(options.timesteps, options.beta_schedule, options.prediction, options.variance)


def with_settings(
    diffusion: GaussianDiffusion | None, options: TrainOptions
) -> tuple[GaussianDiffusion, DiffusionSettings, TrainOptions]:
    """Returns a run's diffusion, its settings, and the options with these settings.

    If `diffusion` is None, the options determine the diffusion. Otherwise, its settings replace the options'.

    Raises:
        TypeError, ValueError: `diffusion` is no GaussianDiffusion, or one that can't be trained or written.
    """
    if diffusion is not None and not isinstance(diffusion, GaussianDiffusion):
        raise TypeError(f"diffusion is a {type(diffusion).__name__}, expected a GaussianDiffusion")
    if diffusion is not None and diffusion.prediction not in SPACED_PREDICTIONS:
        expected = ", ".join(map(repr, SPACED_PREDICTIONS))
        raise ValueError(f"diffusion: its prediction is {diffusion.prediction!r}, expected one of {expected}")
    settings = settings_from(options) if diffusion is None else DiffusionSettings.of(diffusion)
    settings.to_scheduler_config()  # so that its errors appear now, not after training, when the model is written
    if diffusion is None:
        return settings.diffusion(), settings, options
    new_options: dict[str, Any] = {name: getattr(settings, name) for name in ("timesteps", "prediction", "variance")}
    return diffusion, settings, replace(options, beta_schedule="given", **new_options)


def inputs_of(
    model: nn.Module, images: ImageSource, labels: Labels | None, diffusion: GaussianDiffusion
) -> dict[str, Any]:
    """The inputs, besides the options, on which the weights depend, as JSON. The keys are parts of error messages."""
    schedule = hashlib.blake2b(diffusion.betas.numpy().tobytes(), digest_size=8).hexdigest()
    model_part = {f"{MODEL_PREFIX}{name}": value for name, value in network.describe(model).items()}
    class_part: dict[str, Any] = {}
    if labels is not None:
        class_part = {"the classes": list(labels.names), "the labels' hash": digest([labels.numbers.numpy().tobytes()])}
    return {
        **model_part,
        **class_part,
        **({LATENTS: True} if isinstance(images, Latents) else {}),
        "the frozen parameters": [name for name, value in model.named_parameters() if not value.requires_grad],
        "the schedule's hash": schedule,
        "the number of images": len(images),
        SHAPE: list(images.shape),
        "the images' fingerprint": images.fingerprint(),
    }


def save(folder: Path, options: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes options.json, with a run's options and other inputs, in the form of a checkpoint's header.

    Raises OSError if the file can't be written; the message is one sentence.
    """
    path = folder / OPTIONS
    with files.errors_name("out", path):
        files.write_json(path, {"step": 0, "options": options, "about": about})


def find(folder: Path, report: Callable[[str], None] = checkpoints.discard) -> tuple[Path, dict[str, Any]]:
    """The file from which a run is resumed: its newest readable checkpoint, or options.json if it has no checkpoint.

    `report` is called with a line of text for each checkpoint that is newer but damaged.

    If the folder has options.json, the options in the returned header are those in this file, with which the run was
    started last. A checkpoint may have older options, from before a resume changed them.

    Returns:
        The path, and a header with the options ("options"), the other inputs ("about") and the step ("step").

    Raises:
        ValueError: the folder holds no run, options.json is damaged, or no checkpoint can be read although there are
            some.
    """
    checkpoint, path = checkpoints.latest(folder, report), folder / OPTIONS
    if checkpoint is not None:
        checkpoints.check_header(*checkpoint)
    try:
        contents = files.read_json(path)
        options, about = dict(contents["options"]), dict(contents["about"])
    except FileNotFoundError:
        if checkpoint is not None:
            return checkpoint
        raise ValueError(f"run: {folder} holds no run, expected the folder of one that was started") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"resume: {path} is damaged; remove it, and the last checkpoint's options are used") from error
    if checkpoint is not None:
        return checkpoint[0], checkpoint[1] | {"options": options}
    return path, {"step": 0, "options": options, "about": about}
