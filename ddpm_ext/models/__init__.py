"""Denoisers in folders: diffusers' UNet2DModel layout, and "digits" and "shapes", the models in the package."""

from ddpm_ext.models.classes import Classes
from ddpm_ext.models.folder import LoadedModel, build_unet, check_supported, load_model, read_weights, save_model

__all__ = ["Classes", "LoadedModel", "build_unet", "check_supported", "load_model", "read_weights", "save_model"]
