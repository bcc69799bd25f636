"""What a run starts from: the settings of its diffusion, and all that its weights depend on besides the options."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from torch import nn

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.training import network
from ddpm_ext.training.data import ImageSource, Labels
from ddpm_ext.training.data.source import digest
from ddpm_ext.training.options import TrainOptions

__all__ = ["SHAPE", "inputs_of", "with_settings"]

SHAPE = "the shape of images"


def with_settings(
    diffusion: GaussianDiffusion | None, options: TrainOptions
) -> tuple[GaussianDiffusion, DiffusionSettings, TrainOptions]:
    """The diffusion, given or by the options; its settings; and the options with these settings."""
    if diffusion is None:
        settings = DiffusionSettings(options.timesteps, options.beta_schedule, options.prediction, options.variance)
        settings.to_scheduler_config()  # what cannot be written afterwards is refused at once
        return settings.diffusion(), settings, options
    if not isinstance(diffusion, GaussianDiffusion):
        raise TypeError(f"diffusion is a {type(diffusion).__name__}, expected a GaussianDiffusion")
    if diffusion.prediction not in SPACED_PREDICTIONS:
        expected = ", ".join(map(repr, SPACED_PREDICTIONS))
        raise ValueError(f"diffusion: its prediction is {diffusion.prediction!r}, expected one of {expected}")
    settings = DiffusionSettings.of(diffusion)
    settings.to_scheduler_config()
    chosen: dict[str, Any] = {
        "timesteps": settings.timesteps,
        "prediction": settings.prediction,
        "variance": settings.variance,
    }
    return diffusion, settings, replace(options, beta_schedule="given", **chosen)


def inputs_of(
    model: nn.Module, images: ImageSource, labels: Labels | None, diffusion: GaussianDiffusion
) -> dict[str, Any]:
    """What the weights depend on besides the options, as JSON; the keys are parts of error messages."""
    schedule = hashlib.blake2b(diffusion.betas.numpy().tobytes(), digest_size=8).hexdigest()
    model_part = {f"model's {name}": value for name, value in network.describe(model).items()}
    of_classes: dict[str, Any] = {}
    if labels is not None:
        of_classes = {"the classes": list(labels.names), "the labels' hash": digest([labels.numbers.numpy().tobytes()])}
    return {
        **model_part,
        **of_classes,
        "the frozen parameters": [name for name, value in model.named_parameters() if not value.requires_grad],
        "the schedule's hash": schedule,
        "the number of images": len(images),
        SHAPE: list(images.shape),
        "the images' fingerprint": images.fingerprint(),
    }
