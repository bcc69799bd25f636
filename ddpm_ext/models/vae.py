"""Decodes latents to images with diffusers' AutoencoderKL, from the folder vae/ of a pipeline."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.models import limits
from ddpm_ext.models.stored import CONFIG, load_module, make_from_config, read_json, update_hash

FOLDER = "vae"
_LARGEST = 1_000_000  # scaling_factor and shift_factor must have a smaller absolute value
# {entry of the configuration: the only kind of block that it may list}. limits.check_decoder estimates the work of a
# decoder of these blocks, and does not count that of other kinds.
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True)
class LatentDecoder:
    """Decodes latents to images. A call takes and returns a batch, (batch, channels, height, width).

    vae: diffusers' AutoencoderKL, in float32, since activations of common autoencoders overflow in float16.
    scale, shift: the denoiser's latents are (the autoencoder's latents - shift) * scale.
    shape: (channels, height, width) of an image.
    folder: the folder with the autoencoder's files.
    """

    vae: Any
    scale: float
    shift: float
    shape: tuple[int, int, int]
    folder: Path

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The images, float32, approximately in [-1, 1].

        They are decoded one by one, so that memory does not grow with the batch.
        """
        return torch.cat([self.vae.decode(latent[None].float() / self.scale + self.shift).sample for latent in latents])

    def sha256(self) -> str:
        """The SHA-256 of the configuration and the weights."""
        digest = hashlib.sha256()
        update_hash(digest, self.folder)
        return digest.hexdigest()


def find_decoder(folder: Path, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> LatentDecoder | None:
    """The decoder in vae/ of a model's folder; None if the folder has no vae/.

    shape: (channels, height, width) of the latents.

    Raises:
        ValueError: the files are missing, damaged, not supported or of another architecture, or decoding would take too
            much memory or time.
        MissingExtra: diffusers or safetensors is not installed.
    """
    vae_folder = folder / FOLDER
    if not vae_folder.is_dir():
        return None
    name = str(vae_folder / CONFIG)
    config = read_json(vae_folder / CONFIG)
    _check_supported(config, name, shape[0])

    def make(device_name: str) -> Any:
        limits.check_layers(config, name)
        vae_on_device = make_from_config("AutoencoderKL", config, name, device_name)
        if device_name == "meta":
            limits.check_weights(vae_on_device, name)
            limits.check_decoder(vae_on_device, shape[1:], name)
        return vae_on_device

    vae = load_module(make, vae_folder).to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    image_shape = (vae.config.out_channels, shape[1] * factor, shape[2] * factor)
    return LatentDecoder(vae, vae.config.scaling_factor, vae.config.shift_factor or 0.0, image_shape, vae_folder)


def _check_supported(config: dict[str, Any], name: str, channels: int) -> None:
    """Raises ValueError, naming `name`, unless `config` describes an AutoencoderKL that this file can decode with.

    channels: the channels of the denoiser's latents.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"model: {name} describes a {kind}, expected an AutoencoderKL")
    widths = config.get("block_out_channels", [64])
    for entry, block in _BLOCKS.items():
        blocks = config.get(entry, [block])
        if not isinstance(widths, list) or blocks != [block] * len(widths):
            raise ValueError(f"model: {name} has {entry} {blocks!r}, expected {block} for each of block_out_channels")
    if config.get("latent_channels", 4) != channels:
        got = config.get("latent_channels", 4)
        raise ValueError(f"model: {name} has latent_channels {got!r}, expected {channels}, as the denoiser")
    if config.get("out_channels", 3) not in (1, 3):
        raise ValueError(f"model: {name} has out_channels {config['out_channels']!r}, expected 1 or 3")
    for entry in ("latents_mean", "latents_std"):
        if config.get(entry) is not None:
            raise ValueError(f"model: {name} has {entry}, expected null: one scale is taken for all channels")
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
    for entry, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST or not scale:
            raise ValueError(
                f"model: {name} has {entry} {value!r}, expected a number below {_LARGEST}, and a scale not 0"
            )
