"""Denoisers in folders: diffusers' UNet2DModel layout, and the model "digits" that comes with the package."""

from ddpm_ext.models.folder import LoadedModel, build_unet, check_supported, load_model, read_weights, save_model

__all__ = ["LoadedModel", "build_unet", "check_supported", "load_model", "read_weights", "save_model"]
