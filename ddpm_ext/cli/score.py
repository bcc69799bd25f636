"""`ddpm-ext score`: compares finished samples with images by Fréchet distance, precision and recall."""

from __future__ import annotations

import argparse
import platform
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import counter
from ddpm_ext.cli import arguments
from ddpm_ext.cli.arguments import Subparsers, add_command
from ddpm_ext.cli.images import ARRAYS, Samples
from ddpm_ext.plots.style import plural
from ddpm_ext.training.data import ImageSource, load_images
from ddpm_ext.training.inception import NAME, Inception
from ddpm_ext.training.score import Features, features_by_name, features_of, frechet, moments, precision_recall
from ddpm_ext.version import __version__

_NEIGHBOURS = 3  # the number of nearest neighbours for precision and recall
_EXAMPLES = """examples:
  ddpm-ext score samples --data photos
  ddpm-ext score samples.npz --data digits --features pixels
  ddpm-ext score samples --data photos --features my_module:features --device cuda --out scores.json"""


def add_parser(commands: Subparsers) -> None:
    description = (
        "Computes the Fréchet distance of samples to images (Heusel et al. 2017), which is the FID with Inception's "
        f"features,\nand precision and recall by the {_NEIGHBOURS} nearest neighbours (Kynkäänniemi et al. 2019), and "
        "writes them to a file."
    )
    parser = add_command(commands, "score", description, takes="SAMPLES ", epilog=_EXAMPLES)
    samples = "a folder of ddpm-ext sample --num-images, a folder of pictures, or an .npz or .npy of samples"
    parser.add_argument("samples", metavar="SAMPLES", help=samples)
    images = (
        "the images to compare with, all of them, read as ddpm-ext train reads them in the samples' size; or an .npz"
    )
    parser.add_argument("--data", required=True, metavar="digits|shapes|FOLDER|FILE", help=images)
    features = (
        f"what is compared: {NAME}, the network of published FIDs, by torch-fidelity or pytorch-fid; pixels, averaged "
        "to at most 16 by 16; or a function of yours, (batch, channels, height, width) in [-1, 1] -> (batch, features)"
    )
    parser.add_argument("--features", default=NAME, metavar=f"{NAME}|pixels|MODULE:FUNCTION", help=features)
    out = "ends in .json (default: score.json in the folder, or next to the file)"
    parser.add_argument("--out", metavar="FILE", help=out)
    parser.add_argument("--device", metavar="NAME", help=arguments.DEVICES)
    batch = "images at a time"
    parser.add_argument("--batch-size", type=arguments.whole_number(1), default=64, metavar="N", help=batch)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(options: argparse.Namespace) -> None:
    """Prints and writes the scores."""
    device = arguments.check_device(options.device)
    samples = Samples(options.samples, "samples")
    path = Path(options.samples)
    out = options.out or str(path / "score.json" if path.is_dir() else path.with_suffix(".score.json"))
    arguments.check_out(out, (".json",))
    images = _images(options.data, samples.shape)
    if ":" in options.features:
        arguments.find_modules_here()
    function = features_by_name(options.features)
    features_name = f"{NAME} of {function.source}" if isinstance(function, Inception) else options.features
    sample_features, image_features = (
        _features(function, source, options, device, what)
        for source, what in ((samples, "samples"), (images, "images"))
    )
    if sample_features.shape[1] != image_features.shape[1]:
        kinds = f"{sample_features.shape[1]} of samples and {image_features.shape[1]} of images"
        raise ValueError(f"features: got {kinds}, expected as many of both")
    precision, recall = precision_recall(image_features, sample_features, _NEIGHBOURS)
    distance = frechet(moments(sample_features), moments(image_features))
    scores = {"frechet_distance": distance, "precision": precision, "recall": recall}
    about: dict[str, Any] = {
        "neighbours": _NEIGHBOURS,
        "features": features_name,
        "samples": {"path": options.samples, "count": len(samples), "shape": samples.shape, **samples.about},
        "data": {"path": options.data, "count": len(images)},
        "command": shlex.join(["ddpm-ext", *options.arguments]),
        "versions": {"ddpm_ext": __version__, "torch": torch.__version__, "numpy": np.__version__}
        | {"python": platform.python_version()},
    }
    files.write_json(out, scores | about)
    print(f"{plural(len(samples), 'sample')} of {options.samples}, {plural(len(images), 'image')} of {options.data}")
    no_fid = "" if options.features == NAME else ", so the distance is no FID"
    print(f"features: {features_name}, {sample_features.shape[1]} of an image{no_fid}")
    print("Fréchet distance {:.4f}, precision {:.4f}, recall {:.4f}".format(*scores.values()))
    print(out)


def _images(data: str, shape: tuple[int, int, int]) -> ImageSource | Samples:
    """The images of --data. Raises ValueError if they can't have the samples' `shape`."""
    channels, height, width = shape
    images: ImageSource | Samples
    if Path(data).suffix.lower() in ARRAYS and not Path(data).is_dir():
        images = Samples(data, "data")
    else:
        if height != width:
            raise ValueError(f"samples: got {width} by {height} pixels, expected square ones with data {data}")
        images = load_images(data, height, channels)
    if images.shape != shape:
        kinds = ("x".join(map(str, sizes)) for sizes in (images.shape, shape))
        raise ValueError("data: {} has images of {}, expected {}, as the samples".format(data, *kinds))
    return images


def _features(
    function: Features, images: ImageSource | Samples, options: argparse.Namespace, device: torch.device, what: str
) -> Tensor:
    """The features of all images, (count, features) float64. what: the progress bar's name for the images."""
    parts = []
    for index in counter(-(-len(images) // options.batch_size), f"features of {what}", options.quiet or None):
        first = index * options.batch_size
        indices = torch.arange(first, min(first + options.batch_size, len(images)), device="cpu")
        parts.append(features_of(function, options.features, images.batch(indices), device))
        if parts[-1].shape[1] != parts[0].shape[1]:
            sizes = f"{parts[0].shape[1]} of some images and {parts[-1].shape[1]} of others"
            raise ValueError(f"features: got {sizes}, expected as many of all")
    return torch.cat(parts)
