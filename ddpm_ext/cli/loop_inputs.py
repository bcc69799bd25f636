"""Options that become arguments of p_sample_loop: start images, inpainting, the clip, guidance, and how the loop runs.

Most values are not checked here: p_sample_loop checks them, and the command prints its error message.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.cli.arguments import finite_number, whole_number
from ddpm_ext.cli.images import IMAGES, read_images, read_mask, read_noise
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.training.options import DTYPES

_BELONGS_TO = {"weight": "to", "mix": "to", "mask": "inpaint", "jump_length": "inpaint", "jump_n_sample": "inpaint"}


def add_clip(group: Any, *, threshold: bool = True, clips: bool = True) -> None:
    """Adds to a group of options those that clip the predicted x_0.

    Args:
        threshold: whether the group gets the options of dynamic thresholding.
        clips: whether x_0 is clipped by default. If not, there is no option --no-clip.
    """
    alternatives = group.add_mutually_exclusive_group()
    clip = f"range that the predicted x_0 is clipped to (default: {'-1 1' if clips else 'none'})"
    alternatives.add_argument("--clip", type=finite_number, nargs=2, metavar=("LOW", "HIGH"), help=clip)
    if clips:
        alternatives.add_argument("--no-clip", action="store_true", help="do not clip the predicted x_0")
    else:
        group.set_defaults(no_clip=True)
    if threshold:
        quantile = "clip each sample's predicted x_0 by its own quantile (Imagen); 0.995 is usual"
        alternatives.add_argument("--threshold", type=finite_number, metavar="QUANTILE", help=quantile)
        most = "the largest bound that --threshold may use (default: any)"
        group.add_argument("--threshold-max", type=finite_number, metavar="X", help=most)


def clip_of(options: argparse.Namespace) -> bool | Clip | DynamicThreshold:
    """The argument clip_denoised of p_sample_loop. Raises ValueError for --threshold-max without --threshold."""
    quantile, most = getattr(options, "threshold", None), getattr(options, "threshold_max", None)
    if quantile is not None:
        return DynamicThreshold(quantile, **({} if most is None else {"maximum": most}))
    if most is not None:
        raise ValueError("threshold-max: belongs to --threshold")
    if options.clip is not None:
        return tuple(options.clip)
    return not options.no_clip


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a loop that begins from images or given noise, or fills in a part of images (inpainting)."""
    description = f"FILES are {IMAGES}.\nSample i has image i; after the last comes the first again."
    add = parser.add_argument_group("to begin from images", description).add_argument
    add("--start", metavar="FILES", help="begin from these images with noise, in place of noise alone")
    share = "with --start: share of the steps to take, from the last, above 0 to 1; less keeps more of the image"
    add("--strength", type=finite_number, default=1.0, metavar="X", help=share)
    to = "with --start: interpolate from its images to these; all samples have the same noise, for a smooth path"
    add("--to", metavar="FILES", help=to)
    weight = "with --to: the weight of its images, 0 to 1 (default: from 0 to 1 over the samples)"
    add("--weight", type=finite_number, metavar="X", help=weight)
    mix = "with --to: along the great circle, or the straight line (default: slerp)"
    add("--mix", choices=("slerp", "lerp"), help=mix)
    noise = "begin from this noise: an .npy that ddpm-ext invert wrote"
    add("--noise", metavar="FILE", help=noise)
    add = parser.add_argument_group("to fill in a part of images").add_argument
    add("--inpaint", metavar="FILES", help="images of which a part is kept; the rest is drawn")
    mask = "with --inpaint: a picture, white where the image is kept and black where it is drawn"
    add("--mask", metavar="FILE", help=mask)
    passes = "with --inpaint: times that each stretch of steps is taken (RePaint; default: 1)"
    add("--jump-n-sample", type=whole_number(1), metavar="N", help=passes)
    length = "with --inpaint: steps of such a stretch (default: 10)"
    add("--jump-length", type=whole_number(1), metavar="N", help=length)


def running_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments compile, autocast and graph of p_sample_loop."""
    autocast = None if options.autocast is None else DTYPES[options.autocast]
    run_options = {name: getattr(options, name, False) for name in ("compile", "graph")}
    return {"autocast": autocast, **run_options}


def guidance_of(options: argparse.Namespace) -> Guidance | None:
    """The argument guidance of p_sample_loop.

    Raises:
        TypeError, ValueError: see Guidance; or --guidance-rescale or --guidance-interval is set without --guidance.
    """
    rescale, interval = options.guidance_rescale, options.guidance_interval
    if options.guidance is None:
        for name, value in (("rescale", rescale), ("interval", interval)):
            if value is not None:
                raise ValueError(f"guidance-{name}: belongs to --guidance")
        return None
    return Guidance(options.guidance, rescale=rescale or 0.0, interval=None if interval is None else tuple(interval))


@dataclass(frozen=True)
class LoopInputs:
    """The input images of a loop, on the model's device and in the samples' dtype.

    count: the number of samples that the command draws.
    start, to, noise, inpaint: the images, or for --noise the noisy samples, of the options with these names, (images,
        channels, height, width). None if the option is not set.
    mask: (1, 1, height, width), 1 where samples equal the image `inpaint`, 0 where they are drawn.
    """

    count: int
    start: Tensor | None = None
    to: Tensor | None = None
    noise: Tensor | None = None
    inpaint: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def read(
        cls, options: argparse.Namespace, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> LoopInputs:
        """Reads the images that the options name.

        `count` is --num or --num-images. Without these options it is the number of images of the option that has the
        most, or without images the command's default.

        Raises:
            ValueError: an image can't be read, an option is set without another that it needs, or both --noise and
                --start are set.
            MissingExtra: pillow, which reads pictures, is not installed.
        """
        for name, other in _BELONGS_TO.items():
            if getattr(options, name) is not None and getattr(options, other) is None:
                raise ValueError(f"{name.replace('_', '-')}: belongs to --{other}")
        for option, other in (("to", "start"), ("inpaint", "mask")):
            if getattr(options, option) is not None and getattr(options, other) is None:
                raise ValueError(f"{option}: got {getattr(options, option)}, expected --{other} as well")
        if options.noise is not None and options.start is not None:
            raise ValueError("noise and start are both given, expected one of them")
        images_of: dict[str, Tensor] = {}
        for name in ("start", "to", "inpaint"):
            if getattr(options, name) is not None:
                images_of[name] = read_images(getattr(options, name), shape, name)
        if options.noise is not None:
            images_of["noise"] = read_noise(options.noise, shape)
        images = max(map(len, images_of.values()), default=options.default_num)
        if options.mask is not None:
            images_of["mask"] = read_mask(options.mask, shape)
        count = getattr(options, "num_images", None) or options.num or images
        # Inpaint copies images that are not contiguous. A captured loop would go on reading the copies, and would not
        # see the images of later batches.
        return cls(count, **{name: value.to(device, dtype).contiguous() for name, value in images_of.items()})

    def sample_ids(self, options: argparse.Namespace, samples: range) -> int | Tensor:
        """The argument sample_ids of Philox, which gives each sample its own noise: the first id of `samples`.

        For --to without --weight it is zeros, one for each sample: on this path from the images of --start to those of
        --to, all samples have the same noise, so that they change smoothly.
        """
        if self.to is not None and options.weight is None:
            return torch.zeros(len(samples), dtype=torch.int64, device=self.to.device)
        return samples.start

    def of_samples(self, options: argparse.Namespace, samples: range) -> dict[str, Any]:
        """The arguments of p_sample_loop that the options of this file determine, except guidance.

        samples: the ids of the batch's samples.

        Raises:
            TypeError, ValueError: see DynamicThreshold, Inpaint and Interpolation; or --threshold-max is set without
                --threshold.
        """
        ids = torch.arange(samples.start, samples.stop, device="cpu")

        def images_of_ids(images: Tensor | None) -> Tensor | None:
            return None if images is None else images[(ids % len(images)).to(images.device)]

        start: Tensor | Interpolation | None = images_of_ids(self.start)
        if self.to is not None:
            weight = ids / (self.count - 1) if self.count > 1 else torch.full((1,), 0.5, device="cpu")
            chosen = weight if options.weight is None else options.weight
            start = Interpolation(images_of_ids(self.start), images_of_ids(self.to), chosen, options.mix or "slerp")  # type: ignore[arg-type]
        jumps = {"jump_length": options.jump_length, "jump_n_sample": options.jump_n_sample}
        inpaint = None
        if self.inpaint is not None:
            set_jumps = {name: value for name, value in jumps.items() if value is not None}
            inpaint = Inpaint(images_of_ids(self.inpaint), self.mask, **set_jumps)  # type: ignore[arg-type]
        return {
            "start": start,
            "strength": options.strength,
            "noise": images_of_ids(self.noise),
            "inpaint": inpaint,
            "clip_denoised": clip_of(options),
            **running_of(options),
        }

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """The options of this file that are set and change samples, and the SHA-256 of each tensor of images.

        The values can be written as JSON. --guidance is not among them: cli/sample.py adds it with the null class.
        """
        image_options = ("weight", "mix", "jump_length", "jump_n_sample")
        names = (
            "clip",
            "threshold",
            "threshold_max",
            "guidance_rescale",
            "guidance_interval",
            *image_options,
            "autocast",
        )
        settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        if options.no_clip:
            settings["clip"] = "none"
        if options.strength != 1:
            settings["strength"] = options.strength
        for name in ("start", "to", "noise", "inpaint", "mask"):
            images = getattr(self, name)
            if images is not None:
                settings[name] = hashlib.sha256(images.cpu().float().numpy().tobytes()).hexdigest()
        return settings
