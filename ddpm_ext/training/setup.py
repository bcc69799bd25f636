"""Set-up before the first step of a run: makes the model, and checks that options, data and model fit one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpm_ext.base.ranks import Ranks
from ddpm_ext.base.seeds import seed_for
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.classes import Classes
from ddpm_ext.ops.noise import Philox
from ddpm_ext.training import network
from ddpm_ext.training.data import ImageSource, Latents
from ddpm_ext.training.hub import check_pushable
from ddpm_ext.training.options import TrainOptions
from ddpm_ext.training.step import loss_options

# Options that must be 0 or False for latents, which are no pictures.
_ONLY_FOR_PICTURES = ("sample_every", "score_every", "flip")


def check_fit(options: TrainOptions, images: ImageSource, ranks: Ranks) -> None:
    """Raises ValueError, naming the option, if an option doesn't fit the data or the number of ranks."""
    for name in _ONLY_FOR_PICTURES if isinstance(images, Latents) else ():
        if value := getattr(options, name):
            raise ValueError(f"{name}: got {value} for latents, which are no pictures, expected none")
    if options.sample_every and images.shape[0] not in (1, 3):
        raise ValueError(f"sample_every: images have {images.shape[0]} channels, expected 1 or 3 for pictures")
    if options.batch_size < ranks.size * options.accumulate:
        raise ValueError(
            f"batch_size: got {options.batch_size}, expected at least {ranks.size} ranks times "
            f"{options.accumulate} accumulated parts"
        )
    if options.graph and ranks.size > 1:
        raise ValueError(f"graph: got {ranks.size} ranks, expected 1")


def make_model(
    argument: Any, options: TrainOptions, shape: tuple[int, int, int], classes: Classes | None, device: torch.device
) -> nn.Module:
    """The model, on the device and in training mode. argument: the `model` argument of Trainer.

    Raises:
        ValueError: the model doesn't fit the options or the images.
    """
    model = argument
    if not isinstance(model, nn.Module):
        source = options.model_config if argument is None else argument
        torch.manual_seed(seed_for(options.seed, "weights"))
        model = network.make_unet(source, options, shape, None if classes is None else classes.embeddings)
    if options.push_to_hub:
        check_pushable(model)
    if options.gradient_checkpointing:
        network.enable_checkpointing(model)
    return nn.Module.to(model, device).train()


def try_out(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    options: TrainOptions,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    labelled: bool,
) -> None:
    """Calls the model and the loss once, so that an error appears before the first step.

    labelled: whether the model is called with labels.
    """
    x = torch.zeros(1, *shape, dtype=torch.float32, device=device)
    t = torch.zeros(1, dtype=torch.int64, device="cpu")
    labels = torch.zeros(1, dtype=torch.int64, device=device) if labelled else None
    with torch.no_grad():
        output = network.try_out(model, x, t.to(device), diffusion.variance, labels)
        diffusion.train_losses(lambda x, t: output, x, 0, rng=Philox(0), **loss_options(options))
