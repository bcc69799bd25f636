"""Loads and saves denoisers in folders with diffusers' layout. The models "digits" and "shapes" are in the package.

A folder has config.json, diffusion_pytorch_model.safetensors and scheduler_config.json, and for a class-conditional
model classes.json. In the folder of a pipeline, scheduler_config.json is in scheduler/, and the other files are in
unet/, or in transformer/ for a DiTTransformer2DModel. If the path of a pipeline's unet/ or transformer/ is loaded, and
this sub-folder has no scheduler_config.json, that of the pipeline is read. For a model of latents, vae/ has an
AutoencoderKL.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ddpm_ext.base import files
from ddpm_ext.models.classes import CLASSES, Classes
from ddpm_ext.models.networks import (
    DIT,
    FOLDERS,
    UNet2DModel,
    build_unet,
    check_supported,
    embeddings_of,
    folder_of_denoiser,
    kind_of,
    shape_of,
)
from ddpm_ext.models.scheduler import DiffusionSettings, clips, read_settings
from ddpm_ext.models.stored import CONFIG, WEIGHTS, check_finite, load_module, read_json, update_hash, write_weights
from ddpm_ext.models.tuned import FOLDER, table_name, tables_in
from ddpm_ext.models.vae import FOLDER as VAE
from ddpm_ext.models.vae import LatentDecoder, find_decoder
from ddpm_ext.tables.names import nearest_names
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.variances import VARIANCES

DIGITS, SHAPES = (Path(__file__).resolve().parent / name for name in ("digits", "shapes"))
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A denoiser for sampling, with the settings of the diffusion that it was trained for.

    unet: a UNet2DModel, or a DiTTransformer2DModel.
    settings: the arguments of GaussianDiffusion.
    folder: the folder that it was loaded from.
    classes: the classes of a class-conditional model, which is called with class_labels. None for another model.
    shape: (channels, height, width) of one sample, in the space of the denoiser.
    clip: whether samples are in [-1, 1], to be passed as a loop's clip_denoised. It is the scheduler's clip_sample.
        Without this entry, and for a PNDMScheduler, which ignores it, clip is False if the folder has vae/, else True.
    decoder: for a model of latents, decoder(latents) returns their images. None if the folder has no vae/.

    Examples:
        >>> digits = load_model("digits")
        >>> loop = digits.settings.diffusion().p_sample_loop
        >>> table = digits.tuned(4)  # for four calls
        >>> images = loop(digits.unet, (2, *digits.shape), sampler=table, record="last", progress=False)
    """

    unet: UNet2DModel
    settings: DiffusionSettings
    folder: Path
    classes: Classes | Any = None  # "| Any", so that callers with a class-conditional model need no check for None
    shape: tuple[int, int, int] = field(kw_only=True)
    clip: bool = field(default=True, kw_only=True)
    decoder: LatentDecoder | None = field(default=None, kw_only=True)

    @property
    def latent(self) -> bool:
        """Whether samples are latents: with a decoder, or if they are not clipped and can't be grey or RGB images."""
        return self.decoder is not None or (not self.clip and self.shape[0] not in (1, 3))

    @property
    def embeddings(self) -> int:
        """The number of class embeddings, with the null class; 0 for an unconditional model."""
        return embeddings_of(self.unet.config, type(self.unet).__name__) or 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample's image."""
        return self.shape if self.decoder is None else self.decoder.shape

    def tuned(self, calls: int, guidance: float | None = None) -> StepTable:
        """The step table that was tuned to the model, from the model's folder, for `sampler=` of a loop.

        `ddpm-ext tune` writes such tables.

        Args:
            calls: the number of model calls in a loop with the table.
            guidance: the scale of the loop's classifier-free guidance.

        Raises:
            ValueError: the folder has no such table, or the table is damaged. OSError: it can't be read.
        """
        path = self.folder / FOLDER / table_name(calls, guidance)
        if not path.is_file():
            names = tables_in(self.folder)
            status = f"has those for {', '.join(names)}" if names else "has none"
            guided = "" if guidance in (None, 1) else f" with guidance {guidance:g}"
            raise ValueError(f"there is no tuned table for {calls} calls{guided}; {self.folder / FOLDER} {status}")
        return StepTable.load(path)


def load_model(
    source: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Loads a model from a local folder in diffusers' layout. Nothing is downloaded.

    A DiT whose output has twice the sample's channels also predicts the variance. Unless the scheduler's configuration
    has a learned variance, the settings then have the variance `learned_range`. (diffusers' DiTPipeline drops the
    second half of the output.) To sample latents, pass `clip_denoised=model.clip` to the loop.

    Args:
        source: the folder, or "digits" or "shapes", the models in this package.
        device, dtype: the device and dtype of the model's weights.

    Returns:
        The model in evaluation mode, without gradients, and its diffusion's settings.

    Raises:
        ValueError: the folder or a file in it is missing, damaged or pickled; or the model is not supported, because
            its architecture, its autoencoder or its scheduler is not.
        MissingExtra: diffusers or safetensors is not installed.

    Examples:
        >>> digits = load_model("digits")
        >>> gd, shape = digits.settings.diffusion(), (16, *digits.shape)
        >>> samples = gd.p_sample_loop(digits.unet, shape, sampler="dpmpp_2m", steps=2, progress=False)
    """
    folder = {"digits": DIGITS, "shapes": SHAPES}.get(str(source), Path(source))
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.parent.is_dir()
        raise ValueError(
            f"model: no such folder: {source}; expected {nearest_names(str(source), [DIGITS.name, SHAPES.name])} or a "
            "folder in diffusers' layout"
            + (f"; nothing is downloaded here: hf download {source} --local-dir {folder.name}" if hub else "")
        )
    for part in ("vqvae", "movq"):
        if (folder / part).is_dir():
            raise ValueError(f"model: {folder} samples in a latent space ({part}/), expected an AutoencoderKL in vae/")
    model_folder = folder_of_denoiser(folder)
    config = read_json(model_folder / CONFIG)
    check_supported(config, model_folder / CONFIG)
    (settings, clip), classes = _find_settings(folder), _find_classes(model_folder, config)
    unet = load_module(lambda device_name: build_unet(config, str(model_folder / CONFIG), device_name), model_folder)
    # The model's method to() would warn about low precision even if all modules support it.
    torch.nn.Module.to(unet, device=device, dtype=dtype)
    check_finite(unet, model_folder / WEIGHTS)
    shape = shape_of(unet)
    if kind_of(config) == DIT and unet.out_channels == 2 * shape[0] and not VARIANCES[settings.variance].learned:
        settings = replace(settings, variance="learned_range")
    return LoadedModel(
        unet, settings, folder, classes, shape=shape, clip=clip, decoder=find_decoder(folder, shape, device)
    )


def model_sha256(model: LoadedModel) -> str:
    """The SHA-256 of the architecture, the weights and the diffusion's settings, which identifies a denoiser.

    A copy of the folder has the same hash. vae/ and classes.json are not hashed, since no output of the denoiser
    depends on them.
    """
    digest = hashlib.sha256(repr(astuple(model.settings)).encode())
    update_hash(digest, folder_of_denoiser(model.folder))
    return digest.hexdigest()


def save_model(
    unet: UNet2DModel,
    settings: DiffusionSettings,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    classes: Classes | None = None,
    clip: bool = True,
) -> None:
    """Writes `unet`, with weights rounded to `dtype`, the configuration of its scheduler, and its classes to `folder`.

    diffusers reads the files with from_pretrained(folder), a method of the model's class and of DDPMScheduler, or for
    "flow" of FlowMatchEulerDiscreteScheduler.

    unet: a UNet2DModel or a DiTTransformer2DModel.
    classes: None removes the classes of a model that was saved in `folder` before.
    clip: whether samples are in [-1, 1], which is False for latents.

    Raises:
        ValueError: diffusers has no scheduler for the settings. OSError: a file can't be written.
        MissingExtra: safetensors is not installed.

    Examples:
        >>> digits = load_model("digits")
        >>> save_model(digits.unet, digits.settings, "copy-of-digits")
    """
    folder_path, scheduler = Path(folder), settings.to_scheduler_config(clip=clip)
    write_weights(unet, folder_path / WEIGHTS, dtype)
    files.write_text(folder_path / CONFIG, unet.to_json_string())
    files.write_json(folder_path / SCHEDULER, scheduler)
    if classes is not None:
        classes.save(folder_path)
    else:
        (folder_path / CLASSES).unlink(missing_ok=True)


def _find_classes(folder: Path, config: dict[str, Any]) -> Classes | None:
    """The classes of the model in `folder`, or None for an unconditional model.

    A folder that another program has written has no classes.json. Then the names of the classes are their numbers, and
    only a DiT has a null class.

    Raises:
        ValueError: classes.json is damaged, or has more classes than the model.
    """
    kind = kind_of(config)
    count, path = embeddings_of(config, kind), folder / CLASSES
    if count is None:
        return None
    if not path.is_file():
        null = count - 1 if kind == DIT else None
        return Classes(tuple(map(str, range(count if null is None else null))), null)
    classes = Classes.read(read_json(path), str(path))
    if classes.embeddings > count:
        raise ValueError(f"model: {path} has {classes.embeddings} classes, expected at most {count}, as {CONFIG} has")
    return classes


def _find_settings(folder: Path) -> tuple[DiffusionSettings, bool]:
    """The diffusion's settings, and whether samples are in [-1, 1], from the scheduler's configuration.

    Without a configuration, the settings are the defaults, and samples are in [-1, 1] unless the folder has vae/.
    """
    has_decoder = (folder / VAE).is_dir()
    candidates = [folder / "scheduler" / SCHEDULER, folder / SCHEDULER]
    if folder.resolve().name in FOLDERS.values():  # a pipeline's unet/ or transformer/
        candidates.append(folder.resolve().parent / "scheduler" / SCHEDULER)
    for path in candidates:
        if path.is_file():
            config = read_json(path)
            return read_settings(config, str(path)), clips(config, str(path), default=not has_decoder)
    return DiffusionSettings(), not has_decoder
