"""Pictures of samples without axes: grids, labelled strips of a trajectory, GIFs.

The type Images is a numpy array or tensor (batch, channels, height, width) in [-1, 1], with 1 channel (grey) or 3
(colour). The type Pixels is a uint8 array with the channels last.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ddpm_ext.base import checks
from ddpm_ext.base.files import atomic_path
from ddpm_ext.base.optional import require

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
Images = torch.Tensor | npt.NDArray[np.floating]

_BACKGROUND, _TEXT_COLOUR = (255, 255, 255), (40, 40, 40)
_GAP_COLOUR = (88, 104, 136)  # the colour of gaps: neither black nor white, so that the edges of digits are visible
_GAP = 4  # pixels between two images
_ENLARGED_SIDE = 64  # small images are enlarged until their longer side has about this many pixels
_TITLE_SIZE, _LABEL_SIZE = 18, 13  # font sizes in pixels
_NAME_HEIGHT = 18  # pixels for a name below its image
_LAST_FRAME_MS = 2000  # how long a GIF shows its last frame
_X_T_TITLE, _X_0_TITLE = "x_t, the sample at timestep t", "x_0, as the model predicts it from x_t"


def to_uint8(images: Images) -> Pixels:
    """Converts (batch, channels, height, width) in [-1, 1] to (batch, height, width, channels) uint8.

    As in guided-diffusion's scripts, values outside are clipped and fractions are dropped. NaN becomes 0.

    Raises:
        ValueError: `images` does not have four dimensions, or holds integers.

    Examples:
        >>> plots.to_uint8(images).shape
        (4, 8, 8, 3)
    """
    pixels = torch.as_tensor(images, device="cpu")
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(
            f"images: got {pixels.dtype} of shape {tuple(pixels.shape)}, "
            "expected floating point of shape (batch, channels, height, width)"
        )
    scaled = ((pixels.detach().float() + 1) * 127.5).nan_to_num_(0.0).clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _enlarged(images: Pixels, scale: int | None) -> Pixels:
    """The images in RGB, with each pixel as a square of `scale` by `scale`; None chooses a scale by their size."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"images: got {images.dtype} of shape {images.shape}, "
            "expected uint8 of shape (count, height, width, channels)"
        )
    count, height, width, channels = images.shape
    if not images.size:
        raise ValueError(f"images: got none, in shape {images.shape}, expected at least 1")
    if channels not in (1, 3):
        raise ValueError(f"images: got {channels} channels, expected 1 or 3 for a picture")
    if scale is None:
        scale = max(1, round(_ENLARGED_SIDE / max(height, width)))
    checks.integer("scale", scale, 2**31, "2^31", start=1)
    coloured = np.broadcast_to(images, (count, height, width, 3))
    return coloured.repeat(scale, axis=1).repeat(scale, axis=2)


def grid(images: Pixels, *, columns: int | None = None, scale: int | None = None) -> Pixels:
    """Puts images into one picture, row by row.

    Args:
        images: (count, height, width, channels) uint8.
        columns: images in a row. None means about as many as there are rows.
        scale: how many times the images are enlarged, without smoothing. None enlarges small ones.

    Returns:
        (height, width, 3) uint8.

    Raises:
        TypeError, ValueError: there are no images, or their dtype or shape is wrong; `columns` or `scale` is not an int
            of at least 1.

    Examples:
        >>> plots.grid(plots.to_uint8(images), columns=2, scale=1).shape  # with 4 pixels between images
        (28, 28, 3)
    """
    large = _enlarged(images, scale)
    count, height, width, _ = large.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    checks.integer("columns", columns, 2**31, "2^31", start=1)
    rows = math.ceil(count / columns)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    picture = np.full(shape, _GAP_COLOUR, np.uint8)
    for index, image in enumerate(large):
        top, left = (_GAP + (index // columns) * (height + _GAP), _GAP + (index % columns) * (width + _GAP))
        picture[top : top + height, left : left + width] = image
    return picture


def strips(
    images: Sequence[Pixels], labels: Sequence[str], title: str, *, scale: int | None = None, names: Sequence[str] = ()
) -> Pixels:
    """Shows how samples change: a row for each sample, a column for each step, labels above the columns.

    Args:
        images: the samples at each step, (samples, height, width, channels) uint8.
        labels: one for each step.
        scale: see grid.
        names: the samples' names, left of their rows, or empty for no names.

    Returns:
        (height, width, 3) uint8.

    Raises:
        TypeError, ValueError: the errors of grid; there are not as many labels as steps, or names as samples, or the
            steps differ in shape.
        MissingExtra: pillow is not installed.

    Examples:
        >>> picture = plots.strips([plots.to_uint8(x_t), plots.to_uint8(images)], ["t = 999", "t = 0"], "two steps")
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"labels: got {len(labels)} for {len(images)} steps, expected as many, at least 1")
    shapes = {batch.shape for batch in images}
    if len(shapes) > 1:
        raise ValueError(f"images: got steps of shapes {sorted(shapes)}, expected one shape")
    steps, samples = len(images), len(images[0])
    _check_names(names, samples)
    by_row = np.stack(images, axis=1).reshape(steps * samples, *images[0].shape[1:])
    return _headed(grid(by_row, columns=steps, scale=scale), title, labels, names)


def _check_names(names: Sequence[str], samples: int) -> None:
    if names and len(names) != samples:
        raise ValueError(f"names: got {len(names)} for {samples} samples, expected as many, or none")


def _named_grid(images: Pixels, names: Sequence[str], scale: int | None) -> Pixels:
    """Draws a grid with a name below each image, and with columns that fit the longest name. names may be empty."""
    if not names:
        return grid(images, scale=scale)
    image, draw, font = (require(f"PIL.{name}", "drawing") for name in ("Image", "ImageDraw", "ImageFont"))
    small = font.load_default(size=_LABEL_SIZE)
    large = _enlarged(images, scale)
    count, height, width, _ = large.shape
    tile_width = max(width, *(math.ceil(small.getlength(name)) + _GAP for name in names))
    left = (tile_width - width) // 2
    tiles = np.full((count, height + _NAME_HEIGHT, tile_width, 3), _GAP_COLOUR, np.uint8)
    tiles[:, :height, left : left + width] = large
    for index, name in enumerate(names):
        tile = image.fromarray(tiles[index])
        position = (left + width / 2, height + _NAME_HEIGHT - _GAP)
        draw.Draw(tile).text(position, name, fill=_BACKGROUND, font=small, anchor="ms")
        tiles[index] = np.asarray(tile)
    return grid(tiles, scale=1)


def _headed(body: Pixels, title: str, labels: Sequence[str] = (), names: Sequence[str] = ()) -> Pixels:
    """Adds a title above the picture `body`, labels below the title, evenly spread over the width of `body`, and names
    left of `body`, evenly spread over its height."""
    image, draw, font = (require(f"PIL.{name}", "drawing") for name in ("Image", "ImageDraw", "ImageFont"))
    large, small = font.load_default(size=_TITLE_SIZE), font.load_default(size=_LABEL_SIZE)
    head_height = 56 if labels else 32
    left = max((math.ceil(small.getlength(name)) + 2 * _GAP for name in names), default=0)
    width = max(left + body.shape[1], math.ceil(large.getlength(title)) + 4 * _GAP)
    picture = image.new("RGB", (width, body.shape[0] + head_height), _BACKGROUND)
    picture.paste(image.fromarray(body), (left, head_height))
    pen = draw.Draw(picture)
    pen.text((_GAP, 22), title, fill=_TEXT_COLOUR, font=large, anchor="ls")
    pitch = (body.shape[1] - _GAP) / max(1, len(labels))
    for column, label in enumerate(labels):
        pen.text(
            (left + _GAP / 2 + pitch * (column + 0.5), head_height - 6),
            label,
            fill=_TEXT_COLOUR,
            font=small,
            anchor="ms",
        )
    pitch = (body.shape[0] - _GAP) / max(1, len(names))
    for row, name in enumerate(names):
        pen.text(
            (left - _GAP, head_height + _GAP / 2 + pitch * (row + 0.5)),
            name,
            fill=_TEXT_COLOUR,
            font=small,
            anchor="rm",
        )
    return np.asarray(picture)


def trajectory(
    x_t: Sequence[Images],
    x_0: Sequence[Images],
    labels: Sequence[str],
    *,
    scale: int | None = None,
    name: str = "",
    names: Sequence[str] = (),
) -> Pixels:
    """Draws two strips, one above the other: x_t, and the x_0 that the model predicts from it.

    Args:
        x_t, x_0: the same samples at the same steps, for each step (samples, channels, height, width) in [-1, 1].
        labels, scale, names: see strips.
        name: the sampler's name, for the title.

    Returns:
        (height, width, 3) uint8.

    Raises:
        TypeError, ValueError, MissingExtra: the errors of strips; `x_0` has not as many steps as `x_t`.

    Examples:
        >>> picture = plots.trajectory([x_t, images], [images, images], ["t = 999", "t = 0"], name="ddim")
    """
    _check_pairs(x_t, x_0)
    halves = [
        strips([to_uint8(batch) for batch in steps], labels, title, scale=scale, names=names)
        for steps, title in ((x_t, f"{name and f'{name}: '}{_X_T_TITLE}"), (x_0, _X_0_TITLE))
    ]
    return np.concatenate(_equally_wide(halves))


def trajectory_frames(
    x_t: Sequence[Images],
    x_0: Sequence[Images],
    labels: Sequence[str],
    *,
    scale: int | None = None,
    name: str = "",
    names: Sequence[str] = (),
) -> list[Pixels]:
    """Draws a frame of a GIF for each step: a grid of x_t on the left, a grid of the predicted x_0 on the right.

    The arguments and errors are trajectory's. The label is above x_t, and each sample's name is below its two images.

    Returns:
        For each step (height, width, 3) uint8, all of one size, for save_gif.

    Examples:
        >>> frames = plots.trajectory_frames([x_t, images], [images, images], ["t = 999", "t = 0"])
        >>> plots.save_gif(frames, "trajectory.gif")
    """
    _check_pairs(x_t, x_0)
    if len(labels) != len(x_t):
        raise ValueError(f"labels: got {len(labels)} for {len(x_t)} steps, expected as many, at least 1")
    _check_names(names, len(x_t[0]))
    frames = []
    for noisy, clean, label in zip(x_t, x_0, labels, strict=True):
        sides = [
            _headed(_named_grid(to_uint8(images), names, scale), title)
            for images, title in ((noisy, f"{name and f'{name}: '}x_t, {label}"), (clean, "predicted x_0"))
        ]
        if sides[0].shape[0] != sides[1].shape[0]:
            raise ValueError(f"x_0: got shape {tuple(clean.shape)}, expected that of x_t, {tuple(noisy.shape)}")
        gap = np.full((len(sides[0]), 4 * _GAP, 3), _BACKGROUND, np.uint8)
        frames.append(np.concatenate([sides[0], gap, sides[1]], axis=1))
    return _equally_wide(frames)


def _equally_wide(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Fills narrower pictures with white on the right. Widths differ if a long title makes a picture wider."""
    widest = max(picture.shape[1] for picture in pictures)
    return [np.pad(p, ((0, 0), (0, widest - p.shape[1]), (0, 0)), constant_values=_BACKGROUND[0]) for p in pictures]


def _check_pairs(x_t: Sequence[Images], x_0: Sequence[Images]) -> None:
    if not len(x_t) or len(x_t) != len(x_0):
        raise ValueError(f"x_0: got {len(x_0)} steps, x_t has {len(x_t)}, expected as many, at least 1")


def save_picture(picture: Pixels, path: str | os.PathLike[str]) -> None:
    """Writes a picture, (height, width, 3) uint8, to `path`, atomically; the ending names the format.

    Raises:
        ValueError: the picture has a wrong dtype or shape, Pillow doesn't know the ending, or `path` is a folder.
        OSError: `path` can't be written. MissingExtra: pillow is not installed.

    Examples:
        >>> plots.save_picture(plots.grid(plots.to_uint8(images)), "grid.png")
    """
    image = require("PIL.Image", "writing pictures").fromarray(_checked("picture", picture))
    with atomic_path(path) as temporary:
        image.save(temporary)


def _checked(name: str, picture: Pixels) -> Pixels:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{name}: got {picture.dtype} of shape {picture.shape}, expected uint8 (height, width, 3)")
    return picture


def save_grid(
    images: Images, path: str | os.PathLike[str], *, columns: int | None = None, scale: int | None = None
) -> None:
    """Writes images (batch, channels, height, width) in [-1, 1] as one picture. See grid and save_picture for errors.

    Examples:
        >>> plots.save_grid(images, "grid.png", columns=2)
    """
    save_picture(grid(to_uint8(images), columns=columns, scale=scale), path)


def save_strips(
    images: Sequence[Images],
    labels: Sequence[str],
    title: str,
    path: str | os.PathLike[str],
    *,
    scale: int | None = None,
    names: Sequence[str] = (),
) -> None:
    """Writes the picture that strips draws.

    Args:
        images: the samples at each step, (samples, channels, height, width) in [-1, 1].
        labels, title, scale, names: see strips.

    Raises:
        TypeError, ValueError, OSError, MissingExtra: the errors of strips and save_picture.

    Examples:
        >>> plots.save_strips([x_t, images], ["t = 999", "t = 0"], "two steps", "strips.png")
    """
    save_picture(strips([to_uint8(batch) for batch in images], labels, title, scale=scale, names=names), path)


def save_gif(frames: Sequence[Pixels], path: str | os.PathLike[str], *, seconds: float = 6.0) -> None:
    """Writes frames as a GIF that repeats forever; the last frame is shown for two seconds.

    Equal consecutive frames are merged into one, which is shown for the sum of their times. A frame of a GIF has up to
    256 colours; further colours are approximated.

    Args:
        frames: (height, width, 3) uint8 each, all of one size.
        path: the file, which is written atomically.
        seconds: the time of each frame but the last, times the number of frames. A frame's time is rounded to
            hundredths of a second, the unit of the format. It is at least 20 ms, because viewers show shorter frames
            more slowly.

    Raises:
        ValueError: there are no frames, their dtype or shape is wrong, they differ in shape, `seconds` is not finite
            and above 0, or `path` is a folder.
        OSError: `path` can't be written. MissingExtra: pillow is not installed.

    Examples:
        >>> plots.save_gif([plots.grid(plots.to_uint8(x)) for x in (x_t, images)], "two.gif", seconds=1.0)
    """
    if not frames:
        raise ValueError("frames: got none, expected at least 1")
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise ValueError(f"frames: got shapes {sorted(shapes)}, expected one shape")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: got {seconds}, expected a finite number above 0")
    fromarray = require("PIL.Image", "writing GIFs").fromarray
    pictures: list[Image.Image] = [fromarray(_checked("frames", frame)) for frame in frames]
    milliseconds = max(20, 10 * round(100 * seconds / len(pictures)))
    durations = [milliseconds] * (len(pictures) - 1) + [_LAST_FRAME_MS]
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )
