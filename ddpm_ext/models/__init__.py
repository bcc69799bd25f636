"""Denoisers in folders: diffusers' UNet2DModel layout, and the model "digits" that the package contains."""

from ddpm_ext.models.folder import LoadedModel, build_unet, check_supported, load_model, read_weights, save_model

__all__ = ["LoadedModel", "build_unet", "check_supported", "load_model", "read_weights", "save_model"]
