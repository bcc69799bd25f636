"""Loads and saves denoisers in diffusers' UNet2DModel layout; two of them, "digits" and "shapes", are in the package.

A folder holds config.json, diffusion_pytorch_model.safetensors and scheduler_config.json, and for a class-conditional
model classes.json. In the folder of a pipeline the third is in scheduler/ and the others are in unet/; unet/ alone has
that scheduler, too.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.models.classes import CLASSES, Classes
from ddpm_ext.models.limits import check_cost, check_layers
from ddpm_ext.models.scheduler import DiffusionSettings, read_settings
from ddpm_ext.models.tuned import FOLDER, table_name, tables_in
from ddpm_ext.tables.step_table import StepTable

UNet2DModel = Any  # diffusers' class; diffusers is imported only when a model is made

DIGITS, SHAPES = (Path(__file__).resolve().parent / name for name in ("digits", "shapes"))
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class LoadedModel:
    """A denoiser that is ready to sample, with the settings of the diffusion that it was trained for.

    classes: those of a class-conditional model, which is called with class_labels; None for another.
    shape: (channels, height, width) of one sample.

    Examples:
        >>> digits = load_model("digits")
        >>> loop = digits.settings.diffusion().p_sample_loop
        >>> table = digits.tuned(4)  # for four calls
        >>> images = loop(digits.unet, (2, *digits.shape), sampler=table, record="last", progress=False)
    """

    unet: UNet2DModel
    settings: DiffusionSettings
    folder: Path
    classes: Classes | None = None
    shape: tuple[int, int, int] = field(kw_only=True)

    def tuned(self, calls: int, guidance: float | None = None) -> StepTable:
        """The step table in the folder that was tuned to the model, as `ddpm-ext tune` writes it; for `sampler=`.

        Args:
            calls: of the model, in a loop with the table.
            guidance: the scale of the loop's classifier-free guidance.

        Raises:
            ValueError: the folder has no such table, or it is damaged. OSError: it can't be read.
        """
        path = self.folder / FOLDER / table_name(calls, guidance)
        if not path.is_file():
            there = tables_in(self.folder)
            has = f"has those for {', '.join(there)}" if there else "has none"
            guided = "" if guidance in (None, 1) else f" with guidance {guidance:g}"
            raise ValueError(f"there is no tuned table for {calls} calls{guided}; {self.folder / FOLDER} {has}")
        return StepTable.load(path)


def load_model(
    source: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Loads a model from a local folder in diffusers' UNet2DModel layout; nothing is downloaded.

    Args:
        source: the folder, or "digits" or "shapes", the models in this package.
        device, dtype: where the model is placed, and the dtype of its weights.

    Returns:
        The model in evaluation mode, without gradients, and its diffusion's settings.

    Raises:
        ValueError: the folder or a file in it is missing, damaged or pickled, or holds what can't be sampled: another
            architecture, a latent model, a scheduler that is no Gaussian diffusion.
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
            f'model: no such folder: {source}; expected "digits", "shapes" or a folder in diffusers\' layout'
            + (f"; nothing is downloaded here: hf download {source} --local-dir {folder.name}" if hub else "")
        )
    for part in ("vae", "vqvae", "movq"):
        if (folder / part).is_dir():
            raise ValueError(f"model: {folder} samples in a latent space ({part}/), expected a model of pixels")
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(inner / CONFIG)
    check_supported(config, inner / CONFIG)
    settings, classes = _find_settings(folder), _find_classes(inner, config)
    weights = read_weights(inner / WEIGHTS)
    # On the meta device first: a configuration may ask for more memory than there is.
    check_architecture(build_unet(config, str(inner / CONFIG), "meta"), weights, inner / WEIGHTS)
    if not all(value.is_floating_point() and bool(torch.isfinite(value).all()) for value in weights.values()):
        raise ValueError(f"model: {inner / WEIGHTS} holds weights that are not finite numbers")
    unet = _make(config, str(inner / CONFIG), "cpu")
    unet.load_state_dict(weights)
    unet.requires_grad_(False)
    # Not the model's own to(), which warns about low precision even if all modules work in it.
    torch.nn.Module.to(unet.eval(), device=device, dtype=dtype)
    check_finite(unet, inner / WEIGHTS)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return LoadedModel(unet, settings, folder, classes, shape=(unet.config.in_channels, height, width))


def model_sha256(model: LoadedModel) -> str:
    """The SHA-256 of the architecture, the weights and the diffusion; the folder's place does not enter it."""
    digest = hashlib.sha256(repr(astuple(model.settings)).encode())
    inner = model.folder / "unet" if (model.folder / "unet").is_dir() else model.folder
    for name in (CONFIG, WEIGHTS):
        with open(inner / name, "rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def save_model(
    unet: UNet2DModel,
    settings: DiffusionSettings,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    classes: Classes | None = None,
) -> None:
    """Writes `unet`, with weights rounded to `dtype`, the configuration of its scheduler, and its classes to `folder`.

    diffusers reads them with UNet2DModel.from_pretrained(folder) and DDPMScheduler.from_pretrained(folder).

    Examples:
        >>> digits = load_model("digits")
        >>> save_model(digits.unet, digits.settings, "copy-of-digits")
    """
    target = Path(folder)
    write_weights(unet, target / WEIGHTS, dtype)
    files.write_text(target / CONFIG, unet.to_json_string())
    files.write_json(target / SCHEDULER, settings.to_scheduler_config())
    if classes is not None:
        classes.save(target)


def write_weights(module: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Writes a module's state dict as safetensors, with floating-point tensors rounded to `dtype`."""
    to_bytes = require("safetensors.torch", "writing model files").save
    # safetensors refuses tensors that share memory, as tied weights do, so each is copied.
    weights = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for name, value in module.state_dict().items()
    }
    files.write_bytes(path, to_bytes(weights, metadata={"format": "pt"}))


def build_unet(config: dict[str, Any], name: str = "config", device: str = "cpu") -> UNet2DModel:
    """Makes a UNet2DModel with random weights on `device`.

    Raises:
        ValueError: diffusers can't make a model from `config`, or it would take more than check_cost allows, of which
            nothing is taken then; the message names `name`.
    """
    planned = _make(config, name, "meta")
    size = planned.config.sample_size
    check_cost(planned, None if size is None else (size, size) if isinstance(size, int) else tuple(size), name)
    return planned if device == "meta" else _make(config, name, device)


def _make(config: dict[str, Any], name: str, device: str) -> UNet2DModel:
    unet = require("diffusers", "the model").UNet2DModel  # an import that fails is no fault of the configuration's
    check_layers(config, name)
    try:
        with torch.device(device):
            return unet.from_config(config)
    except Exception as error:  # diffusers checks little, so a bad value can raise any exception
        raise ValueError(f"model: {name} can't make a UNet2DModel ({one_line(error)})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors in a safetensors file; raises ValueError if it is missing, cut short or damaged."""
    load = require("safetensors.torch", "reading model files").load_file
    if not path.is_file():
        pickles = sorted(
            found.name for found in path.parent.glob("*") if found.suffix in {".bin", ".pt", ".pth", ".ckpt"}
        )
        if pickles:
            raise ValueError(
                f"model: {path.parent} has pickled weights ({pickles[0]}), which can run code; expected {path.name}, "
                "which diffusers writes: UNet2DModel.from_pretrained(folder).save_pretrained(folder)"
            )
        raise ValueError(f"model: no such file: {path}")
    try:
        return load(path)
    except Exception as error:  # SafetensorError, OSError, or ValueError if the header is not JSON
        raise ValueError(f"model: {path} is cut short or damaged ({one_line(error)})") from error


def check_architecture(
    module: torch.nn.Module, weights: dict[str, Tensor], path: Path, other: str = f"its {CONFIG}"
) -> None:
    """Raises ValueError, naming `path`, unless `weights` have the names and shapes of the module's.

    other: what the module was made by, or what it is, for the message.
    """
    wanted = module.state_dict()
    for name in (*wanted, *sorted(weights.keys() - wanted.keys())):
        if name not in wanted:
            found = f"{name} is not part of the model"
        elif name not in weights:
            found = f"{name} is missing"
        elif weights[name].shape != wanted[name].shape:
            found = f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(wanted[name].shape)}"
        else:
            continue
        raise ValueError(f"model: {path} holds weights of another architecture than {other}: {found}")


def check_finite(module: torch.nn.Module, path: Path) -> None:
    """Raises ValueError, naming `path`, if weights that were finite are no longer so in the module's dtype."""
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"model: {path} holds weights beyond {str(value.dtype)[6:]}, in {name}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises ValueError if the file is missing, damaged or holds something else."""
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise ValueError(f"model: no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {path} is not readable JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} holds a {type(content).__name__}, expected an object")
    return content


def one_line(error: BaseException) -> str:
    """The message of an exception on one line of at most 200 characters, or its class if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_supported(config: dict[str, Any], path: Path) -> None:
    """Raises ValueError, naming `path`, unless `config` describes a UNet2DModel that can be sampled."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"model: {path} describes a {kind}, expected a UNet2DModel")
    kind = config.get("class_embed_type")
    if kind is not None:
        raise ValueError(f"model: {path} has class_embed_type {kind!r}, expected null: classes are numbers here")
    count = config.get("num_class_embeds")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_CLASSES):
        raise ValueError(f"model: {path} has num_class_embeds {count!r}, expected 1 to {_MOST_CLASSES}")
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


def _find_classes(folder: Path, config: dict[str, Any]) -> Classes | None:
    """The classes of the model in `folder`; of one that another program has written, numbers without a null class."""
    count, path = config.get("num_class_embeds"), folder / CLASSES
    if count is None:
        return None
    if not path.is_file():
        return Classes(tuple(map(str, range(count))))
    classes = Classes.read(read_json(path), str(path))
    if classes.embeddings > count:
        raise ValueError(f"model: {path} has {classes.embeddings} classes, expected at most {count}, as {CONFIG} has")
    return classes


def _find_settings(folder: Path) -> DiffusionSettings:
    places = [folder / "scheduler" / SCHEDULER, folder / SCHEDULER]
    if folder.resolve().name == "unet":  # of a pipeline
        places.append(folder.resolve().parent / "scheduler" / SCHEDULER)
    for path in places:
        if path.is_file():
            return read_settings(read_json(path), str(path))
    return DiffusionSettings()
