"""Images of coloured shapes. Each image is drawn when it is read, and depends only on the seed and its index."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext import reference
from ddpm_ext.training.data.source import Labels

Array = npt.NDArray[np.float64]

_WORD = 2**32  # the number of values of a 32-bit word
# Each pixel is divided into 4 by 4 points. The share of the points that are inside the shape is the shape's opacity in
# the pixel, so that edges are smooth.
_POINTS = 4


class Shapes:
    """An ImageSource of images with one shape each, of random colour, size, position and slant on a dark background.

    Image i shows shape i mod 10 of SHAPES, in the order of their names.

    Args:
        size: height and width in pixels.
        seed: 0 <= seed < 2^64. Another seed gives other images, for example to compare samples with.
        count: the number of images.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> Shapes(seed=1).batch(torch.tensor([0, 7])).shape
        torch.Size([2, 3, 16, 16])
    """

    seeded = False

    def __init__(self, size: int = 16, seed: int = 0, count: int = 2**16) -> None:
        if size < 8:
            raise ValueError(f"image size: got {size}, expected at least 8 for shapes")
        if not 1 <= count <= _WORD:
            raise ValueError(f"count: got {count}, expected 1 to {_WORD}")
        self.shape: tuple[int, int, int] = (3, size, size)
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, seeds: list[int] | None = None) -> Tensor:
        images = self._draw(indices.numpy() % len(SHAPES), self._uniform_numbers(indices)[..., None, None])
        return torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous()

    def labels(self) -> Labels:
        return Labels(torch.arange(self.count, device="cpu") % len(SHAPES), tuple(SHAPES))

    def fingerprint(self) -> str:
        return f"shapes {self.shape} {self.seed} {self.count}"

    def _uniform_numbers(self, indices: Tensor) -> Array:
        """Uniform random numbers in [0, 1), (batch, 12).

        They come from Philox, so they don't depend on the machine or on the versions of libraries.
        """
        blocks = torch.arange(3, device="cpu")
        counter = torch.zeros(len(indices), len(blocks), 4, dtype=torch.int64, device="cpu")
        counter[..., 0], counter[..., 1] = blocks, indices[:, None]
        key = torch.tensor([self.seed % _WORD, self.seed // _WORD], device="cpu")
        return (reference.philox4x32(counter, key).flatten(1).double() / _WORD).numpy()

    def _draw(self, shapes: npt.NDArray[np.int64], uniform_numbers: Array) -> Array:
        """Draws images, (batch, size, size, 3) in [-1, 1].

        shapes: the position of each image's shape in SHAPES, (batch,).
        uniform_numbers: random numbers in [0, 1) that determine the image, (batch, 12, 1, 1).
        """
        size, uniform = self.shape[1], uniform_numbers.swapaxes(0, 1)
        radius, angle = 0.6 + 0.25 * uniform[0], 0.7 * (uniform[1] - 0.5)
        right, up = (1 - radius) * (2 * uniform[2:4] - 1)
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius

        def in_shape_coordinates(x: Array, y: Array) -> tuple[Array, Array]:
            return cos * (x - right) + sin * (y - up), cos * (y - up) - sin * (x - right)

        inside_functions = tuple(SHAPES.values())
        points = zip(shapes, *in_shape_coordinates(*_coordinates(size * _POINTS)), strict=True)
        inside = np.stack([inside_functions[shape](u, v) for shape, u, v in points])
        covered = inside.reshape(-1, size, _POINTS, size, _POINTS).mean((2, 4))[..., None]
        x, y = _coordinates(size)
        background = _mix(
            _colour(uniform[4], 0.4 + 0.3 * uniform[5], 0.1 + 0.15 * uniform[6]),
            _colour(uniform[4] + 0.2 * uniform[7], 0.4 + 0.3 * uniform[5], 0.25 + 0.25 * uniform[6]),
            (1 - y) / 2,
        )
        bright = _colour(uniform[8], 0.55 + 0.45 * uniform[9], 0.85 + 0.15 * uniform[10])
        paint = _mix(bright, 0.7 * bright, (1 - in_shape_coordinates(x, y)[1]) / 2)
        return 2 * (background + covered * (paint - background)) - 1


def _coordinates(count: int) -> tuple[Array, Array]:
    """The coordinates x, to the right, and y, upwards, of count by count points in a square from -1 to 1."""
    coordinates = (np.arange(count, dtype=np.float64) + 0.5) * (2 / count) - 1
    return coordinates[None, :], -coordinates[:, None]


def _colour(hue: Array, saturation: Array, value: Array) -> Array:
    """Converts HSV, (...) each with hue in turns, to red, green and blue in [0, 1], (..., 3)."""
    # The distance of the hue from the complements of red, green and blue, in sixths of a turn.
    distance = np.abs((hue[..., None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3)
    return value[..., None] * (1 - saturation[..., None] * (1 - (distance - 1).clip(0, 1)))


def _mix(first: Array, second: Array, share: Array) -> Array:
    """Mixes colours, (..., 3). share: (...), the share of the second colour."""
    return first + (second - first) * share.clip(0, 1)[..., None]


# A shape is a function of the coordinates x and y of points, (...) each, that returns whether each point is inside the
# shape, (...) bool. Each shape lies in a circle of radius 1.04 around (0, 0).


def _polygon(*corners: tuple[float, float]) -> Callable[[Array, Array], npt.NDArray[np.bool_]]:
    """Returns a function that says whether points are inside a polygon.

    A point is inside if a ray from the point crosses an odd number of the polygon's sides.
    """

    def inside(x: Array, y: Array) -> npt.NDArray[np.bool_]:
        odd = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if y0 != y1:
                odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (x1 - x0) * (y - y0) / (y1 - y0))
        return odd

    return inside


def _star(count: int, *radii: float) -> list[tuple[float, float]]:
    """The `count` corners of a star or regular polygon, at equal angles, the first at the top.

    The distances of the corners from the centre cycle through `radii`.
    """
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        (radii[i % len(radii)] * math.sin(angle), radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(angles)
    ]


# The shape "drop" is a circle and a triangle with the tip (0, 1). A line from the tip touches the circle at this point.
_TANGENT = 0.55 * math.sqrt(1 - (0.55 / 1.4) ** 2), 0.55**2 / 1.4 - 0.4
_drop_tip = _polygon((0, 1), _TANGENT, (-_TANGENT[0], _TANGENT[1]))

SHAPES: dict[str, Callable[[Array, Array], npt.NDArray[np.bool_]]] = {
    "arrow": _polygon((0, 1), (0.8, 0.1), (0.32, 0.1), (0.32, -0.95), (-0.32, -0.95), (-0.32, 0.1), (-0.8, 0.1)),
    "circle": lambda x, y: np.hypot(x, y) < 0.85,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.9),
    "drop": lambda x, y: (np.hypot(x, y + 0.4) < 0.55) | _drop_tip(x, y),
    "heart": lambda x, y: ((1.3 * x) ** 2 + (1.3 * y + 0.1) ** 2 - 1) ** 3 < (1.3 * x) ** 2 * (1.3 * y + 0.1) ** 3,
    "moon": lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x - 0.5, y - 0.15) > 0.75),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) < 0.24,
    "square": _polygon((0.72, 0.72), (-0.72, 0.72), (-0.72, -0.72), (0.72, -0.72)),
    "star": _polygon(*_star(10, 1, 0.42)),
    "triangle": _polygon(*_star(3, 1)),
}
