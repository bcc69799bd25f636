"""Reads configuration and weights in a model's folder, which may be damaged or untrusted, and writes the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_from_config(kind: str, config: Mapping[str, Any], name: str, device: str) -> Any:
    """Makes a module of diffusers' class `kind` with random weights on a device.

    The caller has checked that the configuration stays within the limits in limits.py.

    Raises:
        ValueError: diffusers can't make the module; the message names `name`.
        MissingExtra: diffusers is not installed.
    """
    maker = getattr(require("diffusers", "the model"), kind)  # before `try`: an import error is not the config's fault
    try:
        with torch.device(device):
            return maker.from_config(config)
    except Exception as error:  # diffusers checks little, so a bad value can raise any exception
        raise ValueError(f"model: {name} makes no {kind} ({one_line(error)})") from error


def load_module(make: Callable[[str], Any], folder: Path) -> Any:
    """Makes a module with the weights in `folder`, on the CPU, in evaluation mode and without gradients.

    make: make(device) returns the module with any weights. It is called for the device "meta" first, to compare the
        weights' names and shapes with the file's: the module of an untrusted configuration may not fit in memory.

    Raises:
        ValueError: the weights are missing, damaged, not finite, or those of another module.
    """
    path = folder / WEIGHTS
    weights = read_weights(path)
    check_architecture(make("meta"), weights, path)
    if not all(value.is_floating_point() and bool(torch.isfinite(value).all()) for value in weights.values()):
        raise ValueError(f"model: {path} holds weights that are not finite numbers")
    module = make("cpu")
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


def update_hash(digest: Any, folder: Path) -> None:
    """Updates a hash of hashlib with the configuration and the weights in `folder`."""
    for name in (CONFIG, WEIGHTS):
        with open(folder / name, "rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors in a safetensors file.

    Raises ValueError if it is missing, incomplete or damaged, and MissingExtra if safetensors is not installed.
    """
    load = require("safetensors.torch", "reading model files").load_file
    if not path.is_file():
        pickles = sorted(
            sibling.name for sibling in path.parent.glob("*") if sibling.suffix in {".bin", ".pt", ".pth", ".ckpt"}
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
    """Raises ValueError, naming `path`, unless `weights` have the names and shapes of the module's weights.

    other: a description of the module or of its configuration, for the message.
    """
    expected = module.state_dict()
    for name in (*expected, *sorted(weights.keys() - expected.keys())):
        if name not in expected:
            difference = f"{name} is not part of the model"
        elif name not in weights:
            difference = f"{name} is missing"
        elif weights[name].shape != expected[name].shape:
            difference = f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
        else:
            continue
        raise ValueError(f"model: {path} holds weights of another architecture than {other}: {difference}")


def check_finite(module: torch.nn.Module, path: Path) -> None:
    """Raises ValueError, naming `path`, if weights are not finite, for example after a cast to a narrower dtype."""
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"model: {path} holds weights beyond {str(value.dtype)[6:]}, in {name}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises ValueError if the file is missing, is damaged, or holds something else."""
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


def write_weights(module: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Writes a module's state dict as safetensors, with floating-point tensors rounded to `dtype`."""
    to_bytes = require("safetensors.torch", "writing model files").save
    # The tensors are copied, because safetensors refuses tensors that share memory, such as tied weights.
    weights = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for name, value in module.state_dict().items()
    }
    files.write_bytes(path, to_bytes(weights, metadata={"format": "pt"}))
