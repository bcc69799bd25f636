"""`ddpm-ext bits-per-dim`: computes the variational bound of images' negative log-likelihood under a model."""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.cli.arguments import Subparsers, add_command, check_out, samples
from ddpm_ext.cli.images import IMAGES, read_images, read_labels
from ddpm_ext.cli.loop_inputs import add_clip, clip_of
from ddpm_ext.cli.sampling import Loaded, load
from ddpm_ext.cli.sampling_options import add_class, add_model, add_running, add_seed
from ddpm_ext.losses.likelihood import BitsPerDim
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.style import plural
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.training.data import Shapes, digits
from ddpm_ext.training.data.source import Labels

_SHAPES_SEED = 1  # the seed of the images "shapes", which differs from that of training images
_SHAPES = 256  # the default number of images "shapes"
_EXAMPLES = """examples:
  ddpm-ext bits-per-dim digits --num 64
  ddpm-ext bits-per-dim photos --model my-run --device cuda --out bits.npz"""


def add_parser(commands: Subparsers) -> None:
    description = (
        "Prints the variational bound of the images' negative log-likelihood, in bits per dimension (Ho et al. 2020, "
        "eq. 5).\nThe model is called once for each of its timesteps. A class-conditional one gets each image's "
        "class,\nwhere the data has classes: sub-folders, or arr_1 of an .npz."
    )
    parser = add_command(commands, "bits-per-dim", description, takes="DATA ", epilog=_EXAMPLES)
    data = f"digits, those held out from training; shapes, {_SHAPES} that training does not draw; or {IMAGES}"
    parser.add_argument("data", metavar="DATA", help=data)
    group = parser.add_argument_group("what to measure")
    add_model(group)
    group.add_argument("--num", type=samples, metavar="N", help="the first N images (default: all)")
    add_seed(group)
    add_class(group, "those of the data, or else the null class")
    no_classes = "give a class-conditional model the null class, also where the data has classes"
    group.add_argument("--no-classes", action="store_true", help=no_classes)
    add_clip(group, threshold=False)
    add_running(parser, batches="images at a time", loop=False)
    add = parser.add_argument_group("output").add_argument
    arrays = "also write each image's total, prior, vlb, x_start_mse and mse; ends in .npz"
    add("--out", metavar="FILE", help=arrays)


def run(options: argparse.Namespace) -> None:
    """Prints the bound, averaged over the images, and its parts."""
    if options.out is not None:
        check_out(options.out, (".npz",))
    if options.no_classes and options.classes is not None:
        raise ValueError(f"no-classes: got --class {options.classes}, expected one of the two")
    loaded = load(options)
    images, labels = _data(options, loaded.model.shape)
    # The bound is about the likelihood of 8-bit images, so images are rounded to 256 levels.
    images = ((images[: options.num] + 1) * 127.5).round_().clamp_(0, 255).div_(127.5).sub_(1)
    numbers, phrase = _classes(loaded, options, labels, len(images))
    starts = range(0, len(images), options.batch_size)
    parts = [_measured(loaded, options, images, numbers, first) for first in starts]
    results = {name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in BitsPerDim._fields}
    if options.out is not None:
        with files.atomic_path(options.out) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, **{name: value.numpy() for name, value in results.items()})  # type: ignore[arg-type]
    total, terms = results["total"].double(), results["vlb"].double()
    error_text = f" +- {total.std().item() / math.sqrt(len(total)):.4f} (standard error)" if len(total) > 1 else ""
    print(f"{plural(len(total), 'image')}{phrase}: {total.mean().item():.4f} bits per dimension{error_text}")
    shares = results["prior"].double().mean(), terms[:, 1:].sum(1).mean(), terms[:, 0].mean()
    print("prior {:.4f}, steps {:.4f}, levels of the image {:.4f}".format(*(share.item() for share in shares)))
    if not torch.isfinite(total).all():
        not_finite = int((~torch.isfinite(total)).sum())
        raise ValueError(f"model: {not_finite} of {len(total)} bounds are not finite numbers")


def _data(options: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[Tensor, Labels | None]:
    """The images of DATA, (images, *shape), and their classes if the data has classes.

    shape: the model's (channels, height, width), to which pictures are resized.
    """
    if options.data == "digits":
        images, numbers = digits("heldout")
        labels = Labels(numbers, tuple(map(str, range(10))))
    elif options.data == "shapes":
        shapes = Shapes(shape[1], _SHAPES_SEED, options.num or _SHAPES)
        images, labels = shapes.batch(torch.arange(len(shapes), device="cpu")), shapes.labels()
    else:
        images = read_images(options.data, shape, "data")
        return images, read_labels(options.data, len(images), "data")
    if images.shape[1:] != shape:
        kinds = ["x".join(map(str, sizes)) for sizes in (images.shape[1:], shape)]
        raise ValueError(f"data: {options.data} are {kinds[0]}, expected {kinds[1]}, as {options.model} has")
    return images, labels


def _classes(
    loaded: Loaded, options: argparse.Namespace, labels: Labels | None, count: int
) -> tuple[Tensor | None, str]:
    """The classes with which the model is called, (count,) int64 or None, and a phrase about them for the output.

    With --class, those classes are assigned in turn; with --no-classes, or if the data has no classes, all images get
    the null class. Otherwise an image's class in the data is looked up among the model's classes, by its name, or by
    its number if the name is a number, as in an .npz.

    Raises ValueError if the model lacks the null class or a class of the data.
    """
    if loaded.classes is None:
        return None, ""
    if options.classes is not None:
        return loaded.labels(range(count)), f" of class {options.classes}"
    if labels is None or options.no_classes:
        if loaded.classes.null is None:
            raise ValueError("class: the model has classes but no null class, expected --class")
        return torch.full((count,), loaded.classes.null, device="cpu"), " without classes"
    numbers = labels.numbers[:count]
    model_class = {}
    for number in numbers.unique().tolist():
        try:
            model_class[number] = loaded.classes.find(labels.names[number])
        except ValueError as error:
            class_ = f"data: in {options.data}, {labels.names[number]} is none of the model's classes"
            raise ValueError(f"{class_}, {str(error).partition(', ')[2]}; or --class or --no-classes") from None
    return torch.tensor([model_class[number] for number in numbers.tolist()], device="cpu"), " with their classes"


def _measured(
    loaded: Loaded, options: argparse.Namespace, images: Tensor, classes: Tensor | None, first: int
) -> BitsPerDim:
    """The bounds of a batch of images, which begins with image `first`."""
    batch = images[first : first + options.batch_size].to(loaded.device, loaded.dtype)
    labels = None if classes is None else classes[first : first + options.batch_size].to(loaded.device)
    unet, clip = loaded.model.unet, clip_of(options)
    assert not isinstance(clip, DynamicThreshold)  # this command has no option for it
    return loaded.diffusion.bits_per_dim(
        unet if labels is None else lambda x, t: unet(x, t, class_labels=labels),
        batch,
        rng=Philox(options.seed, sample_ids=first),
        clip_denoised=clip,
        progress=not options.quiet,
    )
