"""Builds diffusers' denoisers UNet2DModel and DiTTransformer2DModel from configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_ext.models import limits
from ddpm_ext.models.stored import make_from_config

UNET, DIT = "UNet2DModel", "DiTTransformer2DModel"
FOLDERS = {UNET: "unet", DIT: "transformer"}
"""{name of diffusers' class of a denoiser: the sub-folder of a pipeline's folder that holds such a denoiser}"""
UNet2DModel = Any  # diffusers' class; diffusers is imported only when a model is made


def folder_of_denoiser(folder: Path) -> Path:
    """The folder with the denoiser: unet/ or transformer/ in a pipeline's folder, otherwise `folder` itself."""
    return next((folder / name for name in FOLDERS.values() if (folder / name).is_dir()), folder)


def kind_of(config: Mapping[str, Any], name: str | Path = "config") -> str:
    """The name of diffusers' class that a configuration describes; UNet2DModel if the configuration names no class.

    Raises:
        ValueError: the class is not in FOLDERS; the message names `name`.
    """
    kind = config.get("_class_name", UNET)
    if kind not in tuple(FOLDERS):
        raise ValueError(f"model: {name} describes a {kind}, expected a UNet2DModel or a DiTTransformer2DModel")
    return str(kind)


def embeddings_of(config: Mapping[str, Any], kind: str) -> int | None:
    """The number of a model's class embeddings; None if it has no classes. A DiT's last class is the null class."""
    if kind == DIT:
        return int(config.get("num_embeds_ada_norm", limits.DIT["num_embeds_ada_norm"])) + 1
    count: int | None = config.get("num_class_embeds")
    return count


def shape_of(network: Any) -> tuple[int, int, int]:
    """(channels, height, width) of a sample."""
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def build_unet(config: dict[str, Any], name: str = "config", device: str = "cpu") -> UNet2DModel:
    """Builds a UNet2DModel, or a DiTTransformer2DModel if `_class_name` asks for it, with random weights on `device`.

    In training mode, each block of diffusers' DiT drops labels at random, independently of the other blocks. The model
    that this function returns drops none.

    Raises:
        ValueError: `config` is of another class, diffusers can't build a model from it, or the model is beyond the
            limits in limits.py. They are checked before the model takes memory. The message names `name`.
        MissingExtra: diffusers is not installed.
    """
    on_meta = _make(config, name, "meta")
    limits.check_weights(on_meta, name)
    if on_meta.config.sample_size is not None:
        check_size(on_meta, shape_of(on_meta)[1:], name)
    return on_meta if device == "meta" else _make(config, name, device)


def check_size(network: Any, size: tuple[int, int], name: str) -> None:
    """Raises ValueError, naming `name`, if the network can't take samples of this (height, width), or if they take too
    much memory or time.
    """
    if type(network).__name__ == UNET:
        limits.check_unet(network, size, name)
    elif size != shape_of(network)[1:]:
        raise ValueError(f"model: {name} has samples of {size[0]} by {size[1]}, expected those of its configuration")


def _make(config: dict[str, Any], name: str, device: str) -> Any:
    kind = kind_of(config, name)
    if kind == DIT:
        limits.check_transformer(config, name)
    else:
        limits.check_layers(config, name)
    network = make_from_config(kind, config, name, device)
    for module in network.modules():
        if hasattr(module, "token_drop"):  # diffusers' LabelEmbedding, which drops labels in training mode
            module.dropout_prob = 0.0
    return network


def check_supported(config: dict[str, Any], path: Path) -> None:
    """Raises ValueError, naming `path`, unless `config` describes a UNet2DModel or DiTTransformer2DModel with options
    that this package supports.
    """
    if kind_of(config, path) == DIT:
        limits.check_transformer(config, str(path))
        return
    kind = config.get("class_embed_type")
    if kind is not None:
        raise ValueError(f"model: {path} has class_embed_type {kind!r}, expected null: classes are numbers here")
    count = config.get("num_class_embeds")
    if count is not None and (
        isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limits.CLASSES
    ):
        raise ValueError(f"model: {path} has num_class_embeds {count!r}, expected 1 to {limits.CLASSES}")
    if config.get("time_embedding_type") == "fourier":
        raise ValueError(f"model: {path} has Fourier time embeddings (a score model), which are not supported")
    channels, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if outputs not in (channels, 2 * channels if isinstance(channels, int) else None):
        raise ValueError(
            f"model: {path} has {outputs} output channels for {channels} of input, expected as many or twice as many"
        )
    padding = config.get("downsample_padding", 1)
    if padding not in (0, 1):
        raise ValueError(f"model: {path} has downsample_padding {padding!r}, expected 0 or 1")
    size = config.get("sample_size")
    sizes = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(isinstance(side, int) and side > 0 for side in sizes):
        raise ValueError(f"model: {path} has sample_size {size}, expected a positive number or two")
