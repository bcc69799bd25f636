"""What the commands that draw samples share, once their options are parsed."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace

import torch

from ddpm_ext.base.optional import require
from ddpm_ext.cli.arguments import check_device, check_eta
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.folder import LoadedModel, load_model
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.recorder import Recorder
from ddpm_ext.training.options import DTYPES

__all__ = ["Prepared", "are_finite", "draw", "prepare", "refuse_not_finite"]


@dataclass(frozen=True)
class Prepared:
    """A model on its device, its diffusion, and how many steps the loop will take.

    classes: the model's, with the null class of the options; None: it is unconditional.
    chosen: the classes that the samples have in turn, by number; empty: all.
    """

    model: LoadedModel
    diffusion: GaussianDiffusion
    device: torch.device
    steps: int
    classes: Classes | None = None
    chosen: tuple[int, ...] = ()

    def labels(self, samples: range) -> torch.Tensor | None:
        """The samples' classes, (samples,) int64; None for an unconditional model."""
        return None if self.classes is None else self.classes.labels_of(samples, self.chosen)


def prepare(options: argparse.Namespace, *, pictures: bool) -> Prepared:
    """Loads the model, and checks before the work starts what can be checked then.

    pictures: whether the command will write pictures, which need pillow.

    Raises:
        TypeError, ValueError: an option is out of range or doesn't fit another, or the model's folder is wrong.
        MissingExtra: a package that the command needs is not installed.
    """
    device = check_device(options.device)
    if pictures:
        require("PIL.Image", "writing pictures")
    check_eta(options.eta, [options.sampler])
    model = load_model(options.model, device=device, dtype=DTYPES[options.dtype])
    classes, chosen = _classes(model, options)
    diffusion = model.settings.diffusion(options.backend)
    loop = LoopOptions(sampler=options.sampler, steps=options.steps, spacing=options.spacing, eta=options.eta)
    rows = make_loop_rows(diffusion.process, loop)
    return Prepared(model, diffusion, device, len(rows), classes, chosen)


def _classes(model: LoadedModel, options: argparse.Namespace) -> tuple[Classes | None, tuple[int, ...]]:
    """The model's classes, and those that the options choose."""
    classes = model.classes
    if classes is None:
        for option, name in (("class", "classes"), ("guidance", "guidance"), ("null-class", "null_class")):
            if getattr(options, name) is not None:
                raise ValueError(f"{option}: got {getattr(options, name)}, but {options.model} has no classes")
        return None, ()
    if options.null_class is not None:
        count = model.unet.config.num_class_embeds
        if options.null_class >= count:
            raise ValueError(f"null-class: got {options.null_class}, expected 0 to {count - 1}, the model's classes")
        classes = replace(classes, null=options.null_class)
    if options.guidance is not None and classes.null is None:
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
    model, guided = prepared.model, options.guidance is not None
    kwargs = None
    if prepared.classes is not None:
        samples = range(first, first + count)
        kwargs = prepared.classes.model_kwargs(samples, prepared.chosen, guided=guided, device=prepared.device)
    with torch.no_grad():
        drawn = prepared.diffusion.p_sample_loop(
            model.unet if recorder is None else recorder,
            (count, *model.shape),
            sampler=options.sampler,
            steps=options.steps,
            spacing=options.spacing,
            eta=options.eta,
            guidance=options.guidance,
            model_kwargs=kwargs,
            rng=Philox(options.seed, sample_ids=first),
            record="last",
            x0=recorder is not None,
            callback=None if recorder is None else recorder.keep,
            progress=progress and not options.quiet,
            device=prepared.device,
            dtype=DTYPES[options.dtype],
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
