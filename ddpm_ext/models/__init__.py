"""Denoisers in folders with diffusers' layout, and the package's models "digits" and "shapes"."""

from ddpm_ext.models.classes import Classes
from ddpm_ext.models.folder import LoadedModel, load_model, save_model
from ddpm_ext.models.networks import build_unet, check_supported
from ddpm_ext.models.stored import read_weights
from ddpm_ext.models.vae import LatentDecoder

__all__ = [
    "Classes",
    "LatentDecoder",
    "LoadedModel",
    "build_unet",
    "check_supported",
    "load_model",
    "read_weights",
    "save_model",
]
