"""Loads the model of a training run, which may be of any class, and samples from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.guidance import as_guidance
from ddpm_ext.models.classes import CLASSES, Classes
from ddpm_ext.models.folder import SCHEDULER, load_model
from ddpm_ext.models.networks import FOLDERS, build_unet, check_size, check_supported, folder_of_denoiser
from ddpm_ext.models.scheduler import DiffusionSettings, clips, read_settings
from ddpm_ext.models.stored import check_architecture, check_finite, read_json, read_weights
from ddpm_ext.ops.noise import Philox
from ddpm_ext.training import checkpoints, run_options
from ddpm_ext.training.options import with_defaults_of
from ddpm_ext.training.run_options import LATENTS, MODEL_PREFIX, SHAPE, settings_from

# {an option of p_sample_loop that Trained.sample sets itself: the arguments that callers pass instead}
_SET_BY_SAMPLE = {"rng": "seed and first", "model_kwargs": "classes", "record": "none: the last samples are returned"}


@dataclass(frozen=True)
class Trained:
    """A trained model that is ready to sample, with its diffusion, shape and classes.

    model: in evaluation mode, without gradients. It is called as model(x, t), or with classes as model(x, t, labels).
    settings: the settings of the model's diffusion. settings.diffusion() makes the diffusion.
    shape: (channels, height, width) of one sample.
    classes: the classes of a class-conditional model, or None for an unconditional model.
    diffusion: the diffusion to sample with. None means settings.diffusion().
    clip: whether samples are in [-1, 1]. Latents are not.

    Examples:
        >>> from ddpm_ext.models.scheduler import DiffusionSettings
        >>> from ddpm_ext.training import Trained
        >>> class Denoiser(torch.nn.Conv2d):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> trained = Trained(Denoiser(3, 3, 1), DiffusionSettings(timesteps=100), (3, 8, 8))
        >>> samples = trained.sample(2, seed=0, sampler="ddim", steps=5, progress=False)
    """

    model: nn.Module
    settings: DiffusionSettings
    shape: tuple[int, int, int]
    classes: Classes | None = None
    diffusion: GaussianDiffusion | None = field(default=None, repr=False)
    clip: bool = True

    def sample(self, count: int, *, seed: int = 0, first: int = 0, classes: Sequence[int] = (), **loop: Any) -> Tensor:
        """Samples from the model.

        Args:
            count: the number of samples.
            seed, first: the noise has this seed, and the samples have the ids `first`, `first` + 1 and so on.
            classes: the numbers of the samples' classes, assigned in turn by the samples' ids. Empty means all classes.
                An unconditional model ignores them.
            loop: options of GaussianDiffusion.p_sample_loop, such as sampler, steps, spacing and eta. If `guidance` has
                no unconditional model of its own, this model is called with the null class instead.

        Returns:
            Images, (count, channels, height, width), about in [-1, 1], or latents; on the model's device.

        Raises:
            TypeError, ValueError: see p_sample_loop; or `loop` has rng, model_kwargs or record; or guidance needs a
                null class, and the model has none.
        """
        for name, expected in _SET_BY_SAMPLE.items():
            if name in loop:
                raise TypeError(f"{name} is given, expected {expected}")
        model, device, labels = self.model, next(self.model.parameters()).device, {}
        if self.classes is not None:
            guidance = as_guidance(loop.get("guidance"))
            # Without an unconditional model, guidance calls the model with a batch of twice the size.
            doubled_batch = guidance is not None and guidance.unconditional is None
            model_kwargs = self.classes.model_kwargs(
                range(first, first + count), classes, guided=doubled_batch, device=device
            )
            labels = {"labels": model_kwargs["class_labels"]}
        options: dict[str, Any] = {"record": "last", "progress": False, "device": device}
        options |= {"clip_denoised": self.clip} | loop
        with torch.no_grad():
            drawn = (self.diffusion or self.settings.diffusion()).p_sample_loop(
                model if self.classes is None else lambda x, t, labels: model(x, t, labels),
                (count, *self.shape),
                model_kwargs=labels,
                rng=Philox(seed, sample_ids=first),
                **options,
            )
        assert isinstance(drawn, Tensor)  # the type for record="last"
        return drawn

    def sha256(self) -> str:
        """The SHA-256 of the diffusion's settings and the weights."""
        digest = hashlib.sha256(repr(astuple(self.settings)).encode())
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class TakesClassLabels(nn.Module):
    """Takes labels as class_labels=, like a UNet2DModel, and passes them to `module` as its third argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        return self.module(x, t) if class_labels is None else self.module(x, t, class_labels)


def load(run: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu") -> Trained:
    """Loads the averaged weights of a run.

    Args:
        run: the folder of the run. If the run is not finished, the weights are those of its newest checkpoint.
        model: a module of the trained module's architecture, into which the weights are copied. With None, the run's
            model must be a UNet2DModel or a DiTTransformer2DModel. It is built from the configuration in the folder or
            the checkpoint.
        device: the model's device.

    Returns:
        The model, its diffusion's settings, its samples' shape and its classes.

    Raises:
        ValueError: the folder holds no model or a model of another architecture, or a file in it is damaged; `model` is
            None for a model of another class; `model` is not None, and the folder holds a finished UNet2DModel or
            DiTTransformer2DModel; or the run is not finished, and its Trainer got a `diffusion`, which only a finished
            run's folder has.
        MissingExtra: diffusers or safetensors is not installed.

    Examples:
        >>> from ddpm_ext.training import load
        >>> trained = load("my-run")  # doctest: +SKIP
        >>> samples = trained.sample(4, sampler="ddim", steps=5)  # doctest: +SKIP
        >>> other = load("other-run", model)  # doctest: +SKIP
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"run: no such folder: {run}; expected the folder of a run")
    if folder_of_denoiser(folder) != folder:
        loaded = load_model(folder, device=device)
        if model is not None:
            kind = type(loaded.unet).__name__
            raise ValueError(f"model: {folder} holds a {kind}, expected no model=")
        return Trained(loaded.unet, loaded.settings, loaded.shape, loaded.classes, clip=loaded.clip)
    description = _model_description(folder)
    parts = _finished(folder, description) if description else _unfinished(folder)
    if model is None:
        if parts.config["class"] not in FOLDERS:
            reason = f"is a {parts.config['class']}, expected model=, a module like the one that was trained"
            raise ValueError(f"model: that of {folder} {reason}")
        config = {"_class_name" if name == "class" else name: value for name, value in parts.config.items()}
        check_supported(config, parts.path)
        on_meta = build_unet(config, str(parts.path), "meta")
        check_size(on_meta, parts.shape[1:], str(parts.path))
        check_architecture(on_meta, parts.weights, parts.path, "its configuration")
        model = build_unet(config, str(parts.path))
    check_architecture(model, parts.weights, parts.path, f"the {type(model).__name__}")
    model.load_state_dict(parts.weights)
    check_finite(model, parts.path)
    on_device = nn.Module.to(model, device).eval().requires_grad_(False)
    return Trained(on_device, parts.settings, parts.shape, parts.classes, clip=parts.clip)


def network_of(folder: Path) -> str | None:
    """The class of a run's model: "module:name" if the run is finished and a program can import it, else only its name.

    None means UNet2DModel or DiTTransformer2DModel, which need no name.

    Raises:
        ValueError: the folder holds no run, or a file in it is damaged.
    """
    description = _model_description(folder)
    kind = str(description.get("class") or run_options.find(folder)[1]["about"].get(f"{MODEL_PREFIX}class"))
    network = str(description.get("network", ""))
    importable = network and not network.startswith("__main__:") and "<" not in network
    return None if kind in FOLDERS else network if importable else kind


def _model_description(folder: Path) -> dict[str, Any]:
    """The content of a finished run's model.json; empty if the folder has none."""
    return read_json(folder / "model.json") if (folder / "model.json").is_file() else {}


class _Parts(NamedTuple):
    """The content of a run's folder from which load() builds a Trained.

    Attributes:
        path: the file with the weights.
        config: the name of the model's class ("class"). For a UNet2DModel or DiTTransformer2DModel in a checkpoint,
            also its configuration.
        clip: whether samples are in [-1, 1]. Latents are not.
    """

    weights: dict[str, Tensor]
    path: Path
    settings: DiffusionSettings
    shape: tuple[int, int, int]
    classes: Classes | None
    config: dict[str, Any]
    clip: bool


def _finished(folder: Path, description: dict[str, Any]) -> _Parts:
    """Reads a finished run's folder. description: the content of its model.json."""
    path = folder / "model.safetensors"
    scheduler, names = folder / "scheduler" / SCHEDULER, folder / CLASSES
    classes = Classes.read(read_json(names), str(names)) if names.is_file() else None
    scheduler_config = read_json(scheduler)
    settings, clip = read_settings(scheduler_config, str(scheduler)), clips(scheduler_config, str(scheduler))
    shape, config = _checked_shape(description.get("shape"), folder), {"class": description.get("class")}
    return _Parts(read_weights(path), path, settings, shape, classes, config, clip)


def _unfinished(folder: Path) -> _Parts:
    """Reads an unfinished run's folder: the averaged weights in its newest readable checkpoint, and its options."""
    path, header = run_options.find(folder)
    if path.name == run_options.OPTIONS:
        raise ValueError(f"run: {folder} has no model and no checkpoint yet, expected at least one")
    # The device becomes "cpu", since TrainOptions refuses a device that this machine doesn't have, such as the run's.
    options, about = with_defaults_of(header["options"], {"device": "cpu"}), header["about"]
    if options.beta_schedule == "given":
        raise ValueError(f"run: {folder} is not finished, and only then has the schedule that it was given")
    classes = Classes.of_labels(about["the classes"], options.class_dropout) if options.classes else None
    weights = checkpoints.with_prefix(checkpoints.load(path)[0], "average.")
    config = {name.removeprefix(MODEL_PREFIX): value for name, value in about.items() if name.startswith(MODEL_PREFIX)}
    shape = _checked_shape(about.get(SHAPE), folder)
    return _Parts(weights, path, settings_from(options), shape, classes, config, not about.get(LATENTS))


def _checked_shape(shape: Any, folder: Path) -> tuple[int, int, int]:
    """Returns `shape` as a tuple. Raises ValueError unless it is a list of three positive ints."""
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"run: {folder} has samples of shape {shape!r}, expected [channels, height, width]")
    return shape[0], shape[1], shape[2]
