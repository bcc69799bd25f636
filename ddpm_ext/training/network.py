"""The model of a training run: builds a UNet2DModel or a DiT, tries a model out, describes it and writes it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.folder import SCHEDULER, save_model
from ddpm_ext.models.networks import DIT, FOLDERS, build_unet, check_supported, kind_of
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.models.stored import one_line, read_json, write_weights
from ddpm_ext.process.model_output import unwrap
from ddpm_ext.tables.variances import VARIANCES
from ddpm_ext.training.import_by_name import name_of
from ddpm_ext.training.options import TrainOptions

# Options that describe a UNet2DModel. A configuration replaces them.
_WIDTHS = ("widths", "layers", "attention", "head_channels", "groups")


def make_unet(source: Any, options: TrainOptions, shape: tuple[int, int, int], classes: int | None = None) -> nn.Module:
    """Makes a UNet2DModel with random weights, or a DiTTransformer2DModel whose blocks begin as the identity.

    Args:
        source: a configuration, or a JSON file that holds one. For a DiT it has `_class_name`. With None, the options
            determine a UNet2DModel.
        options: the options of the run.
        shape: (channels, height, width) of the images.
        classes: the number of class embeddings, or None for an unconditional model.

    Raises:
        ValueError: the configuration is damaged, or doesn't fit the images or the options.
    """
    if source is None:
        return build_unet(config_of(options, shape, classes))
    defaults = TrainOptions()
    for name in _WIDTHS:
        if getattr(options, name) != getattr(defaults, name):
            raise ValueError(f"{name}: got {getattr(options, name)}, but the model's configuration decides it")
    name = "config" if isinstance(source, dict) else str(source)
    configuration = source if isinstance(source, dict) else read_json(Path(source))
    kind = kind_of(configuration, name)
    required = _required_of_dit(options, shape, classes, name) if kind == DIT else _required(options, shape, classes)
    for key, value in required.items():
        if configuration.get(key) not in (None, value):
            purpose = f"images of shape {shape} " + (f"and {classes} classes" if classes else "without classes")
            raise ValueError(f"model: {name} has {key} {configuration[key]}, expected {value} for {purpose}")
    config = {"_class_name": kind, "dropout": options.dropout, **configuration, **required}
    check_supported(config, Path(name))
    model = build_unet(config, name)
    if kind == DIT:  # the initial values of adaLN-Zero, as in the paper of DiT
        zero_layers = [model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)]
        for value in (value for layer in zero_layers for value in layer.parameters()):
            nn.init.zeros_(value)
    return model


def config_of(options: TrainOptions, shape: tuple[int, int, int], classes: int | None = None) -> dict[str, Any]:
    """The configuration of a UNet2DModel that the options describe.

    Args:
        shape: (channels, height, width) of the images.
        classes: the number of class embeddings, or None for an unconditional model.

    Raises:
        ValueError: the images' sides can't be halved after each level but the last, or a level with attention is too
            narrow.
    """
    _, height, width = shape
    divisor = 2 ** (len(options.widths) - 1)
    if height % divisor or width % divisor:
        raise ValueError(
            f"image size: got {height if height == width else f'{height} by {width}'}, expected a multiple of "
            f"{divisor} for {len(options.widths)} widths"
        )
    levels = range(len(options.widths))
    for level in {*options.attention, levels[-1]}:  # the middle block, which is at the last level, also has attention
        if options.widths[level] < options.head_channels:
            raise ValueError(
                f"widths: got {options.widths[level]} at level {level}, which has attention, expected at least "
                f"head_channels, {options.head_channels}"
            )
    return {
        "_class_name": "UNet2DModel",
        **_required(options, shape, classes),
        "block_out_channels": list(options.widths),
        "layers_per_block": options.layers,
        "down_block_types": ["AttnDownBlock2D" if i in options.attention else "DownBlock2D" for i in levels],
        "up_block_types": ["AttnUpBlock2D" if i in options.attention else "UpBlock2D" for i in reversed(levels)],
        "norm_num_groups": options.groups,
        "attention_head_dim": options.head_channels,
        "dropout": options.dropout,
    }


def _required(options: TrainOptions, shape: tuple[int, int, int], classes: int | None) -> dict[str, Any]:
    """The entries that images, classes and options require in a UNet2DModel's configuration."""
    channels, height, width = shape
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * VARIANCES[options.variance].channels,
        "num_class_embeds": classes,
    }


def _required_of_dit(
    options: TrainOptions, shape: tuple[int, int, int], classes: int | None, name: str
) -> dict[str, Any]:
    """The entries that images, classes and options require in a DiT's configuration.

    name: the configuration's name, for error messages.

    Raises:
        ValueError: the images have no classes, or are no squares.
    """
    channels, height, width = shape
    if classes is None:
        raise ValueError(f"classes: {name} describes a {DIT}, expected classes of the images: it always has them")
    if height != width:
        raise ValueError(f"model: {name} describes a {DIT}, expected squares, and the images are {height} by {width}")
    return {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels * VARIANCES[options.variance].channels,
        "num_embeds_ada_norm": classes - bool(options.class_dropout),  # the DiT adds the null class itself
    }


def enable_checkpointing(model: nn.Module) -> None:
    """Enables gradient checkpointing: the backward pass recomputes most activations, so they are not kept in memory.

    Raises:
        ValueError: the model has no enable_gradient_checkpointing(), a method of diffusers' models, or the method
            fails.
    """
    enable = getattr(model, "enable_gradient_checkpointing", None)
    if not callable(enable):
        raise ValueError(
            f"gradient_checkpointing: a {type(model).__name__} has no method enable_gradient_checkpointing, expected a "
            "model of diffusers, or a module with that method, which calls torch.utils.checkpoint"
        )
    try:
        enable()
    except ValueError as error:  # diffusers raises it for a model that does not support checkpointing
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} fails ({one_line(error)})") from error


def try_out(model: nn.Module, x: Tensor, t: Tensor, variance: str, labels: Tensor | None = None) -> Tensor:
    """Calls model(x, t), or model(x, t, labels), in evaluation mode and returns its output.

    Raises:
        ValueError: the model fails, or its output does not have the shape of x (for a learned variance, of x with twice
            the channels).
    """
    shape, training = tuple(x.shape), model.training
    try:
        output = unwrap(model.eval()(x, t) if labels is None else model.eval()(x, t, labels))
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        arguments = "" if labels is None else " and their labels, its third argument"
        raise ValueError(f"model: it fails for images of shape {shape[1:]}{arguments} ({one_line(error)})") from error
    finally:
        model.train(training)
    expected = (shape[0], shape[1] * VARIANCES[variance].channels, *shape[2:])
    if output.shape != expected:
        raise ValueError(
            f"model: it returns shape {tuple(output.shape)} for images of shape {shape}, expected {expected} with "
            f"variance {variance}"
        )
    return output


def known_kind(model: nn.Module) -> str | None:
    """The name of the model's class if it is one of diffusers' denoisers that a folder can hold, or None.

    This does not import diffusers: unless it was imported before, the model can't be of its classes.
    """
    diffusers = sys.modules.get("diffusers")
    kinds = FOLDERS if diffusers is not None else ()
    return next((kind for kind in kinds if isinstance(model, getattr(diffusers, kind))), None)


def describe(model: nn.Module) -> dict[str, Any]:
    """A model's class, and the configuration of a UNet2DModel or a DiT, or the shapes of any other model's weights."""
    kind = type(model).__qualname__
    if known_kind(model) is not None:
        config = json.loads(model.to_json_string())  # type: ignore[operator]
        return {"class": kind, **{name: value for name, value in config.items() if not name.startswith("_")}}
    return {"class": kind, **{name: list(value.shape) for name, value in model.state_dict().items()}}


def save_result(
    model: nn.Module,
    settings: DiffusionSettings,
    folder: Path,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    classes: Classes | None = None,
    clip: bool = True,
) -> str:
    """Writes a trained model, its diffusion's scheduler, and its classes, if it has any, to a folder.

    - An unconditional UNet2DModel of images is written as the folder of a DDPMPipeline.
    - A UNet2DModel with classes or of latents, and a DiT, are written without model_index.json, since a DDPMPipeline
      can't sample from them.
    - For any other module, model.safetensors has the state dict. model.json has the class, its module, the settings and
      the shape.

    Args:
        settings: the diffusion's settings.
        dtype: the dtype to which weights are rounded.
        shape: (channels, height, width) of the samples.
        clip: whether samples are in [-1, 1]. Latents are not.

    Returns:
        A sentence that says which programs can read the folder.
    """
    scheduler = settings.to_scheduler_config(clip=clip)
    files.write_json(folder / "scheduler" / SCHEDULER, scheduler)
    if known_class := known_kind(model):
        save_model(model, settings, folder / FOLDERS[known_class], dtype=dtype, classes=classes, clip=clip)
        if not clip:
            return f"{folder} is for ddpm-ext sample, with the latents' AutoencoderKL copied to {folder / 'vae'}"
        if classes is not None:
            return f"{folder} is for ddpm-ext sample; diffusers can read its parts, but has no pipeline for classes"
        parts = {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DModel"]}
        version = require("diffusers", "the model").__version__
        files.write_json(
            folder / "model_index.json", {"_class_name": "DDPMPipeline", "_diffusers_version": version, **parts}
        )
        if settings.variance == "learned":
            return f"{folder} is for ddpm-ext sample: diffusers has no variance that is learned as its logarithm"
        return f"{folder} is the folder of a DDPMPipeline, which ddpm-ext sample and diffusers can read"
    write_weights(model, folder / "model.safetensors", dtype)
    if classes is not None:
        classes.save(folder)
    kind = describe(model)["class"]
    description = {"class": kind, "network": name_of(type(model)), "settings": asdict(settings), "shape": list(shape)}
    files.write_json(folder / "model.json", description)
    return (
        f"{folder} has the weights (model.safetensors) but no pipeline: the model is no UNet2DModel; "
        "ddpm_ext.training.load(folder, model) puts them into a module, and ddpm-ext sample --network MODULE:NAME does"
    )
