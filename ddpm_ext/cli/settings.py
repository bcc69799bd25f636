"""What determines the samples of `ddpm-ext sample`: for the manifest of a folder, and beside the samples in an .npz."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ext.cli.arguments import eta_of
from ddpm_ext.cli.network import RunModel
from ddpm_ext.cli.sampling import Prepared
from ddpm_ext.models.folder import CONFIG, WEIGHTS, LoadedModel
from ddpm_ext.version import __version__


def settings_of(options: argparse.Namespace, prepared: Prepared) -> dict[str, Any]:
    """All that determines a sample besides its number."""
    of_classes: dict[str, Any] = {}
    if prepared.classes is not None:
        of_classes["classes"] = list(prepared.chosen) or f"all {len(prepared.classes.names)}"
        if options.guidance is not None:
            of_classes |= {"guidance": options.guidance, "null_class": prepared.classes.null}
    return {
        "version": __version__,
        "model_sha256": model_hash(prepared.model),
        "sampler": options.sampler,
        "steps": prepared.steps,
        "spacing": options.spacing,
        "eta": eta_of(options.sampler, options.eta),
        "seed": options.seed,
        "dtype": options.dtype,
        "backend": options.backend,
        **of_classes,
        **prepared.inputs.settings(options),
    }


def model_hash(model: LoadedModel) -> str:
    """The SHA-256 of the architecture, the weights and the diffusion; the folder's place does not enter it."""
    if isinstance(model, RunModel):
        return model.sha256
    digest = hashlib.sha256(repr(astuple(model.settings)).encode())
    inner = model.folder / "unet" if (model.folder / "unet").is_dir() else model.folder
    for name in (CONFIG, WEIGHTS):
        with open(inner / name, "rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def as_arrays(settings: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The settings as small arrays for an .npz: numbers and texts without dimensions, lists with one. None is left out.

    No name is one that guided-diffusion's evaluator looks for (arr_0, mu, sigma, mu_s, sigma_s).
    """
    return {name: np.asarray(value) for name, value in settings.items() if value is not None}
