"""What the commands that draw samples share, once their options are parsed."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from ddpm_ext.base.optional import require
from ddpm_ext.cli.arguments import check_device, check_eta
from ddpm_ext.cli.loop_inputs import LoopInputs, guidance_of
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.folder import LoadedModel, load_model
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.recorder import Recorder
from ddpm_ext.training.options import DTYPES

__all__ = ["Loaded", "Prepared", "are_finite", "draw", "load", "prepare", "refuse_not_finite"]


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and its diffusion.

    classes: the model's, with the null class of the options; None: it is unconditional.
    chosen: the classes that the samples have in turn, by number; empty: all.
    """

    model: LoadedModel
    diffusion: GaussianDiffusion
    device: torch.device
    dtype: torch.dtype
    classes: Classes | None
    chosen: tuple[int, ...]

    def model_kwargs(
        self, samples: range, *, guided: bool = False, null: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """What the model is called with beside samples of these ids; None for an unconditional model.

        guided: whether there is classifier-free guidance. null: whether samples have the null class where the options
        choose none, and not all classes in turn.
        """
        if self.classes is None:
            return None
        chosen = self.chosen
        if null and not chosen:
            if self.classes.null is None:
                raise ValueError("class: the model has classes, but none that stands for none, expected --class")
            chosen = (self.classes.null,)
        return self.classes.model_kwargs(samples, chosen, guided=guided, device=self.device)

    def labels(self, samples: range) -> torch.Tensor | None:
        """The samples' classes, (samples,) int64; None for an unconditional model."""
        return None if self.classes is None else self.classes.labels_of(samples, self.chosen)


@dataclass(frozen=True)
class Prepared(Loaded):
    """What a loop needs beside the options, and how many steps it will take."""

    steps: int
    inputs: LoopInputs


def load(options: argparse.Namespace) -> Loaded:
    """Loads the model of the options --model, --class, --null-class, --guidance and of how to run.

    Raises:
        TypeError, ValueError: an option is out of range, or the model's folder is wrong.
        MissingExtra: a package that the command needs is not installed.
    """
    device, dtype = check_device(options.device), DTYPES[options.dtype]
    model = load_model(options.model, device=device, dtype=dtype)
    classes, chosen = _classes(model, options)
    if getattr(options, "channels_last", False):
        model.unet.to(memory_format=torch.channels_last)
    return Loaded(model, model.settings.diffusion(options.backend), device, dtype, classes, chosen)


def prepare(options: argparse.Namespace, *, pictures: bool) -> Prepared:
    """Loads the model and images, and checks before the work starts what can be checked then.

    Where options.num is None, it becomes the number of samples to draw.

    pictures: whether the command will write pictures, which need pillow.

    Raises:
        TypeError, ValueError: an option is out of range or doesn't fit another, or the model's folder is wrong.
        MissingExtra: a package that the command needs is not installed.
    """
    check_device(options.device)
    if pictures:
        require("PIL.Image", "writing pictures")
    check_eta(options.eta, [options.sampler])
    loaded = load(options)
    inputs = LoopInputs.read(options, loaded.model.shape, loaded.device, loaded.dtype)
    options.num = inputs.count
    loop = LoopOptions(**_loop_options(inputs, options, range(1)))
    loop.step_options(learned=False, reads_uncond=False)  # checks the clip
    if not isinstance(options.guidance, tuple):  # several, one after another
        guidance_of(options)
    rows = make_loop_rows(loaded.diffusion.process, loop)
    return Prepared(**vars(loaded), steps=len(rows), inputs=inputs)


def _loop_options(inputs: LoopInputs, options: argparse.Namespace, samples: range) -> dict[str, Any]:
    """p_sample_loop's options that don't depend on the model, without guidance, of which a command can draw several."""
    chosen = {name: getattr(options, name) for name in ("sampler", "steps", "spacing", "eta")}
    return chosen | inputs.of_samples(options, samples)


def _classes(model: LoadedModel, options: argparse.Namespace) -> tuple[Classes | None, tuple[int, ...]]:
    """The model's classes, and those that the options choose."""
    classes = model.classes
    if classes is None:
        for option, name in (("class", "classes"), ("guidance", "guidance"), ("null-class", "null_class")):
            if getattr(options, name, None) is not None:
                raise ValueError(f"{option}: got {getattr(options, name)}, but {options.model} has no classes")
        return None, ()
    if getattr(options, "null_class", None) is not None:
        count = model.unet.config.num_class_embeds
        if options.null_class >= count:
            raise ValueError(f"null-class: got {options.null_class}, expected 0 to {count - 1}, the model's classes")
        classes = replace(classes, null=options.null_class)
    if getattr(options, "guidance", None) is not None and classes.null is None:
        raise ValueError(f"guidance: {options.model} does not say which class is the null class, expected --null-class")
    wanted = options.classes.split(",") if options.classes is not None else ()
    return classes, tuple(map(classes.find, wanted))


def draw(
    prepared: Prepared,
    options: argparse.Namespace,
    first: int,
    count: int,
    recorder: Recorder | None = None,
    *,
    progress: bool = True,
) -> torch.Tensor:
    """Draws the seed's samples `first` to `first + count - 1`.

    Args:
        recorder: records x_t and the predicted clean samples along the loop.
        progress: whether to show a progress bar, unless the options say --quiet.

    Returns:
        (count, channels, height, width), of the options' dtype, on the model's device.
    """
    model, guidance, samples = prepared.model, guidance_of(options), range(first, first + count)
    with torch.no_grad():
        drawn = prepared.diffusion.p_sample_loop(
            model.unet if recorder is None else recorder,
            (count, *model.shape),
            **_loop_options(prepared.inputs, options, samples),
            guidance=guidance,
            model_kwargs=prepared.model_kwargs(samples, guided=guidance is not None),
            rng=Philox(options.seed, sample_ids=prepared.inputs.sample_ids(options, samples)),
            record="last",
            x0=recorder is not None,
            callback=None if recorder is None else recorder.keep,
            progress=progress and not options.quiet,
            device=prepared.device,
            dtype=prepared.dtype,
        )
    assert isinstance(drawn, torch.Tensor)  # with record="last"
    return drawn


def are_finite(samples: torch.Tensor) -> list[bool]:
    """For each sample whether all its elements are finite."""
    found: list[bool] = torch.isfinite(samples).flatten(1).all(1).tolist()
    return found


def refuse_not_finite(wrong: int, count: int, out: str | os.PathLike[str]) -> None:
    """Raises ValueError if `wrong` of the `count` samples in `out`, which are all written, are not finite."""
    if wrong:
        raise ValueError(
            f"out: {wrong} of {count} samples are not finite, and black in {out} where they are not: "
            "the model's weights or its configuration are wrong, or its dtype is too narrow"
        )
