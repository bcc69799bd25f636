"""Loads the models of training runs that have no folder in diffusers' layout: users' modules, and unfinished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ddpm_ext.cli.arguments import find_modules_here
from ddpm_ext.models.folder import DIGITS, SHAPES, LoadedModel, model_sha256
from ddpm_ext.models.networks import folder_of_denoiser
from ddpm_ext.models.stored import CONFIG, check_finite, one_line
from ddpm_ext.models.vae import find_decoder
from ddpm_ext.training import load, run_options
from ddpm_ext.training.import_by_name import import_by_name
from ddpm_ext.training.load_run import TakesClassLabels, network_of


@dataclass(frozen=True, kw_only=True)
class RunModel(LoadedModel):
    """A model that training.load has loaded.

    sha256: the hash of its diffusion's settings and of its weights.
    """

    sha256: str

    @property
    def embeddings(self) -> int:
        return 0 if self.classes is None else self.classes.embeddings


def model_hash(model: LoadedModel) -> str:
    """The SHA-256 of a model's content, which does not depend on its folder's path."""
    return model.sha256 if isinstance(model, RunModel) else model_sha256(model)


def is_run(model: str) -> bool:
    """Whether `model`, the value of --model, is the folder of a run without a model in diffusers' layout.

    Such runs are unfinished, or train a module of the user's own.
    """
    folder = Path(model)
    if model in (DIGITS.name, SHAPES.name) or folder_of_denoiser(folder) != folder or (folder / CONFIG).is_file():
        return False
    return any((folder / name).exists() for name in ("model.json", run_options.OPTIONS, "checkpoints"))


def load_run_model(model: str, network: str | None, *, device: torch.device, dtype: torch.dtype) -> RunModel:
    """Loads the averaged weights of a run for which is_run is true.

    network: "module:name" of a class or function that makes the trained module. None for a model of one of
        diffusers' classes, which is built from the configuration in the run's folder.

    Raises:
        ValueError: `network` is missing or wrong; the weights are not finite in `dtype`; or an error of training.load
            or find_decoder.
    """
    folder = Path(model)
    trained = load(folder, network_for(folder, network))
    sha256 = trained.sha256()
    module_on_device = nn.Module.to(trained.model, device=device, dtype=dtype)
    check_finite(module_on_device, folder)
    return RunModel(
        TakesClassLabels(module_on_device).eval(),
        trained.settings,
        folder,
        trained.classes,
        shape=trained.shape,
        clip=trained.clip,
        decoder=find_decoder(folder, trained.shape, device),
        sha256=sha256,
    )


def network_for(folder: Path, network: str | None) -> nn.Module | None:
    """The module that --network makes for a run, or None if the option is not set and the run needs no module.

    The source file of the class or function may be in the working directory.

    Raises:
        ValueError: --network is missing or wrong, or makes no module.
    """
    if network is not None:
        find_modules_here()
        return _network_from(network)
    if (kind := network_of(folder)) is not None:
        name = kind if ":" in kind else f"MODULE:{kind}"
        raise ValueError(
            f"model: {folder} is a run of a {kind.rpartition(':')[2]}, expected --network {name}, or another class or "
            "function that makes one like it without arguments"
        )
    return None


def _network_from(network: str) -> nn.Module:
    make = import_by_name(network, "network", "MODULE:NAME", "a class or a function")
    expected = "expected a class or a function without arguments that makes a module like the one that was trained"
    try:
        module = make()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"network: {network}() fails ({one_line(error)}), {expected}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"network: {network}() returns a {type(module).__name__}, expected a torch.nn.Module")
    return module
