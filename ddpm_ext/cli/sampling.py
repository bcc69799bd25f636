"""What the commands that call a model share: loading the model, checking the options, and drawing samples."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ddpm_ext.base.optional import require
from ddpm_ext.base.ranks import ranks
from ddpm_ext.cli.arguments import check_device, check_eta
from ddpm_ext.cli.chosen_tables import Tables, choose_default, chosen_tables
from ddpm_ext.cli.loop_inputs import LoopInputs, guidance_of
from ddpm_ext.cli.network import is_run, load_run_model
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.results import CapturedLoop
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.folder import LoadedModel, load_model
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.recorder import Recorder
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.training.options import DTYPES


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model on its device, with its diffusion and the classes that the options choose.

    classes: the model's classes, with the null class of --null-class if that is set. None for an unconditional model.
    chosen: the numbers of the classes of --class, which are assigned to samples in turn. Empty means all classes.
    captured: {shape of a batch: the loop that last_samples captured, and the options of the capture}.
    """

    model: LoadedModel
    diffusion: GaussianDiffusion
    device: torch.device
    dtype: torch.dtype
    classes: Classes | None
    chosen: tuple[int, ...]
    captured: dict[tuple[int, ...], tuple[CapturedLoop, dict[str, Any]]] = field(default_factory=dict)

    def last_samples(self, unet: Any, shape: tuple[int, ...], *, progress: bool, **options: Any) -> torch.Tensor:
        """The final samples of p_sample_loop with these options. unet: the model, or a wrapper of it.

        With a CUDA graph, all calls with the same shape share one captured loop. So their options may differ only in
        rng, start, noise, the known images of inpaint, and the tensors in model_kwargs.
        """
        options |= {"device": self.device, "dtype": self.dtype}
        with torch.no_grad():
            if not options["graph"]:
                return self.diffusion.p_sample_loop(unet, shape, record="last", progress=progress, **options)
            if shape not in self.captured:
                self.captured[shape] = self.diffusion.capture(unet, shape, **options), options
            loop, captured_options = self.captured[shape]
            if options.get("inpaint") is not None:  # the graph reads the known images of the capture, so copy to them
                captured_options["inpaint"].known.copy_(options["inpaint"].known)
            call_options = {name: options.get(name) for name in ("start", "noise", "model_kwargs")}
            return loop(options["rng"], progress=progress, **call_options)

    def class_names(self, samples: range) -> list[str]:
        """The names of the samples' classes; empty for an unconditional model."""
        labels = self.labels(samples)
        return [] if self.classes is None or labels is None else [self.classes.names[label] for label in labels]

    def model_kwargs(self, samples: range, *, guided: bool = False) -> dict[str, torch.Tensor] | None:
        """The model's keyword arguments for the samples with these ids; None for an unconditional model.

        guided: whether there is classifier-free guidance.
        """
        if self.classes is None:
            return None
        return self.classes.model_kwargs(samples, self.chosen, guided=guided, device=self.device)

    def labels(self, samples: range) -> torch.Tensor | None:
        """The samples' classes, (samples,) int64; None for an unconditional model."""
        return None if self.classes is None else self.classes.labels_of(samples, self.chosen)


@dataclass(frozen=True, kw_only=True)
class Prepared(Loaded):
    """A model with the input images and tables of its loops.

    steps: the number of rows of the loop's step table. With a sampler that calls the model twice a step, all steps but
        the last have two rows.
    calls: how often the loop calls the model.
    inputs: the input images.
    tables: the tables that the options select, by the scale of guidance.
    default_line: a line that names the default that was chosen; None if the options name a sampler or a table.
    """

    steps: int
    calls: int
    inputs: LoopInputs
    tables: Tables
    default_line: str | None


def load(options: argparse.Namespace, *, latents: bool = False) -> Loaded:
    """Loads the model of the option --model, and checks the options about its classes, guidance and device.

    If the model's samples are not to be clipped, and no option sets a clip, this sets options.no_clip.

    latents: whether the command supports a model of latents.
    """
    device, dtype = check_device(options.device), DTYPES[options.dtype]
    model = _load_model(options, device, dtype)
    if model.latent and not latents:
        raise ValueError(f"model: {options.model} samples latents, expected a model of images, or another command")
    if not (model.clip or getattr(options, "clip", None) or getattr(options, "threshold", None)):
        options.no_clip = True
    classes, chosen = _classes(model, options)
    if getattr(options, "channels_last", False):
        model.unet.to(memory_format=torch.channels_last)
    return Loaded(
        model=model,
        diffusion=model.settings.diffusion(options.backend),
        device=device,
        dtype=dtype,
        classes=classes,
        chosen=chosen,
    )


def _load_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    if is_run(options.model):
        return load_run_model(options.model, options.network, device=device, dtype=dtype)
    loaded = load_model(options.model, device=device, dtype=dtype)
    if options.network is not None:
        needs = "which needs none; expected the folder of a run of another module"
        kind = type(loaded.unet).__name__
        raise ValueError(f"network: got {options.network}, but {options.model} is a {kind}, {needs}")
    return loaded


def prepare(options: argparse.Namespace, *, pictures: bool, latents: bool = False) -> Prepared:
    """Loads the model and the input images, and checks the options as far as possible before the work starts.

    It sets options.num to the number of samples to draw. If the options have neither a sampler nor a table, it sets a
    default, which tell_choice prints.

    Args:
        pictures: whether the command will write pictures, which needs the package pillow.
        latents: see load.
    """
    check_device(options.device)
    if pictures:
        require("PIL.Image", "writing pictures")
    loaded = load(options, latents=latents)
    if loaded.model.latent:
        _check_latents(options, loaded.model)
    default_line = choose_default(options, loaded.model, loaded.diffusion.timesteps)
    check_eta(options.eta, [options.sampler])
    tables = chosen_tables(options, loaded.model)
    inputs = LoopInputs.read(options, loaded.model.shape, loaded.device, loaded.dtype)
    options.num = inputs.count
    for table in tables.values() or (None,):
        loop = LoopOptions(**_loop_options(inputs, options, range(1), table))
        needs = make_loop_rows(loaded.diffusion, loop).needs
    if not isinstance(options.guidance, tuple):  # `draw` checks each of several scales
        guidance_of(options)
    return Prepared(
        **vars(loaded),
        steps=len(needs),
        calls=sum(row.calls_model for row in needs),
        inputs=inputs,
        tables=tables,
        default_line=default_line,
    )


def tell_choice(prepared: Prepared, options: argparse.Namespace) -> None:
    """Prints the chosen default if the options name no sampler and no table. Only rank 0 prints, unless --quiet."""
    if prepared.default_line is not None and not options.quiet and ranks().rank == 0:
        print(prepared.default_line, flush=True)


def _check_latents(options: argparse.Namespace, model: LoadedModel) -> None:
    """Raises ValueError if the model of latents has no decoder, or if --start, --to or --inpaint is set."""
    if model.decoder is None:
        raise ValueError(
            f"model: {options.model} samples latents, expected their AutoencoderKL in {model.folder / 'vae'}"
        )
    for name in ("start", "to", "inpaint"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name}: got {getattr(options, name)}, but {options.model} samples latents, expected none"
            )


def _loop_options(
    inputs: LoopInputs, options: argparse.Namespace, samples: range, table: StepTable | None
) -> dict[str, Any]:
    """The arguments of p_sample_loop for the sampler or the table, and those of LoopInputs.of_samples.

    table: the step table of the loop. None means the sampler that the options name.
    """
    by_name = {name: getattr(options, name) for name in ("sampler", "steps", "spacing", "eta")}
    return (by_name if table is None else {"sampler": table}) | inputs.of_samples(options, samples)


def _classes(model: LoadedModel, options: argparse.Namespace) -> tuple[Classes | None, tuple[int, ...]]:
    """The model's classes, and the numbers of the classes that the options choose."""
    classes = model.classes
    if classes is None:
        for option, name in (("class", "classes"), ("guidance", "guidance"), ("null-class", "null_class")):
            if getattr(options, name, None) is not None:
                reason = f"{options.model} has no classes, expected a class-conditional model, such as shapes"
                raise ValueError(f"{option}: got {getattr(options, name)}, but {reason}")
        return None, ()
    if getattr(options, "null_class", None) is not None:
        if options.null_class >= model.embeddings:
            expected = f"expected 0 to {model.embeddings - 1}, the model's classes"
            raise ValueError(f"null-class: got {options.null_class}, {expected}")
        classes = replace(classes, null=options.null_class)
    if getattr(options, "guidance", None) is not None and classes.null is None:
        raise ValueError(f"guidance: {options.model} does not say which class is the null class, expected --null-class")
    names = options.classes.split(",") if options.classes is not None else ()
    return classes, tuple(map(classes.find, names))


def draw(
    prepared: Prepared,
    options: argparse.Namespace,
    first: int,
    count: int,
    recorder: Recorder | None = None,
    *,
    progress: bool = True,
) -> torch.Tensor:
    """Draws the samples with the numbers `first` to `first + count - 1`.

    Args:
        recorder: records x_t and the predicted clean samples along the loop.
        progress: whether to show a progress bar, unless the options say --quiet.

    Returns:
        (count, channels, height, width), on the model's device. Samples have the dtype of --dtype; images that were
        decoded from latents are float32.
    """
    model, guidance, samples = prepared.model, guidance_of(options), range(first, first + count)
    chosen = {
        **_loop_options(prepared.inputs, options, samples, prepared.tables.get(options.guidance)),
        "guidance": guidance,
        "model_kwargs": prepared.model_kwargs(samples, guided=guidance is not None),
        "rng": Philox(options.seed, sample_ids=prepared.inputs.sample_ids(options, samples)),
    }
    denoiser: Any = model.unet
    if recorder is not None:
        denoiser, chosen = recorder, {**chosen, "x0": True, "callback": recorder.keep}
    drawn = prepared.last_samples(denoiser, (count, *model.shape), progress=progress and not options.quiet, **chosen)
    return drawn if model.decoder is None else model.decoder(drawn)


def are_finite(samples: torch.Tensor) -> list[bool]:
    """For each sample, whether all its elements are finite."""
    finite: list[bool] = torch.isfinite(samples).flatten(1).all(1).tolist()
    return finite


def refuse_not_finite(not_finite: int, count: int, out: str | os.PathLike[str]) -> None:
    """Raises ValueError if any samples are not finite. It is called after they have been written.

    Args:
        not_finite: the number of samples with NaN or infinities.
        count: the number of all samples.
        out: the file or folder that has them.
    """
    if not_finite:
        raise ValueError(
            f"out: {not_finite} of {count} samples are not finite, and black in {out} where they are not: "
            "the model's weights or its configuration are wrong, or its dtype is too narrow"
        )
