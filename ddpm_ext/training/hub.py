"""Uploads a trained model to the Hugging Face Hub, with the methods of diffusers' objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ddpm_ext.base.optional import require
from ddpm_ext.models.classes import CLASSES
from ddpm_ext.models.folder import SCHEDULER
from ddpm_ext.models.networks import folder_of_denoiser, kind_of
from ddpm_ext.models.stored import CONFIG, one_line, read_json
from ddpm_ext.training.network import known_kind


def push_to_hub(
    run: str | os.PathLike[str],
    repo: str,
    *,
    model: nn.Module | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Uploads the model of a run to a repository of the Hub, which is created if it doesn't exist.

    An unconditional UNet2DModel of images is uploaded by DDPMPipeline.push_to_hub. For a UNet2DModel with classes or of
    latents, and for a DiT, the model, its scheduler and its classes.json, if there is one, are uploaded. ddpm_ext and
    diffusers can read the repository's files.

    Args:
        run: the folder of a finished run, or its best/ or an ema-DECAY/.
        repo: "name" or "organisation/name".
        model: needed if the run's model is neither a UNet2DModel nor a DiT: a model with the run's weights, such as
            `training.load(run, model).model`. Its method push_to_hub is called.
        private: whether a new repository is private. None means the default of its owner on the Hub.
        token: the Hub's token. None means the token that `hf auth login` has stored, or HF_TOKEN.

    Returns:
        The address of the upload, as diffusers returns it.

    Raises:
        ValueError: without `model`, the folder holds neither a UNet2DModel nor a DiT, or its configuration is damaged;
            or `model` has no push_to_hub.
        ConnectionError: the upload fails. The message names the repository, and the call that tries again.
        MissingExtra: diffusers is not installed.

    Examples:
        >>> from ddpm_ext.training import push_to_hub
        >>> url = push_to_hub("my-run", "me/flowers")  # doctest: +SKIP
    """
    folder = Path(run)
    if model is not None:
        check_pushable(model)
        push: Callable[..., Any] = model.push_to_hub  # type: ignore[assignment]
    elif (denoiser_folder := folder_of_denoiser(folder)) != folder:
        if (folder / "model_index.json").is_file():
            push = require("diffusers", "the upload").DDPMPipeline.from_pretrained(folder).push_to_hub
        else:
            push = _push_parts(folder, denoiser_folder)
    else:
        raise ValueError(f"push_to_hub: {folder} has no unet/ or transformer/, expected one, or model=")
    try:
        return str(push(repo, private=private, token=token))
    except Exception as error:  # the errors of network, login and Hub have no common base class
        arguments = f"{str(folder)!r}, {repo!r}{'' if model is None else ', model=...'}"
        raise ConnectionError(
            f"push_to_hub: {repo} can't be written ({one_line(error)}); {folder} has the model, and "
            f"ddpm_ext.training.push_to_hub({arguments}) tries again"
        ) from error


def check_pushable(model: nn.Module) -> None:
    """Raises ValueError unless load_model can read the model's class, or the model has a method push_to_hub."""
    if known_kind(model) is None and not callable(getattr(model, "push_to_hub", None)):
        raise ValueError(
            f"push_to_hub: a {type(model).__name__} has no method push_to_hub, expected a model of diffusers; "
            "hf upload REPO FOLDER uploads the run's files"
        )


def _push_parts(folder: Path, denoiser_folder: Path) -> Callable[..., Any]:
    """Returns a function that uploads the denoiser in `denoiser_folder`, its classes and its scheduler."""
    diffusers = require("diffusers", "the upload")
    denoiser = getattr(diffusers, kind_of(read_json(denoiser_folder / CONFIG), denoiser_folder)).from_pretrained(
        denoiser_folder
    )
    kind = read_json(folder / "scheduler" / SCHEDULER)["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder / "scheduler")

    def push(repo: str, *, private: bool | None, token: str | None) -> Any:
        upload = denoiser.push_to_hub(repo, subfolder=denoiser_folder.name, private=private, token=token)
        scheduler.push_to_hub(repo, subfolder="scheduler", private=private, token=token)
        if (denoiser_folder / CLASSES).is_file():
            api = require("huggingface_hub", "the upload").HfApi(token=token)
            # `repo` may lack the owner's name, but the address of the upload has it.
            repo_id, path_in_repo = (
                getattr(getattr(upload, "repo_url", None), "repo_id", repo),
                f"{denoiser_folder.name}/{CLASSES}",
            )
            api.upload_file(path_or_fileobj=str(denoiser_folder / CLASSES), path_in_repo=path_in_repo, repo_id=repo_id)
        return upload

    return push
