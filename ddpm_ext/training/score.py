"""Scores of samples: Fréchet distance to images (Heusel et al. 2017, eq. 6), precision and recall. Also the scores of a
run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.ranks import Ranks, part_of
from ddpm_ext.base.seeds import seed_for
from ddpm_ext.training import inception
from ddpm_ext.training.data import DamagedImage, ImageSource
from ddpm_ext.training.import_by_name import import_by_name, theirs
from ddpm_ext.training.options import TrainOptions

Features = Callable[[Tensor], Any]
"""A function of images, (batch, channels, height, width) float32 in [-1, 1] on the run's device, that returns features,
(batch, features)."""

_PIXELS = "pixels"
# Larger images are averaged to this side: the covariance has as many entries as the square of the number of pixels.
_SIDE = 16
_DISTANCES = 2**23  # the most distances that are computed at a time
_REFERENCE = 5000  # the most training images that samples are compared with


Moments = tuple[Tensor, Tensor]
"""A mean, (features,), and a matrix A, (rows, features), with A^T A = the covariance."""


def moments(features: Tensor) -> Moments:
    """The mean of features, (count, features) float64 with count at least 2, and a factor of their covariance."""
    count, size = features.shape
    mean = features.mean(0)
    factor = (features - mean) / (count - 1) ** 0.5
    return mean, torch.linalg.qr(factor, mode="r").R if count > size else factor


def frechet(one: Moments, other: Moments) -> float:
    """The squared Fréchet distance of two Gaussians: |m - n|^2 + tr(C + D - 2 (C D)^(1/2)); 0 for the same ones.

    With C = A^T A and D = B^T B the eigenvalues of C D are the squared singular values of A B^T. These are real
    numbers whatever the rank, so that fewer samples than features are enough.
    """
    (mean, factor), (other_mean, other_factor) = one, other
    traces = factor.square().sum() + other_factor.square().sum()
    shared = torch.linalg.svdvals(factor @ other_factor.T).sum()
    return max(0.0, float((mean - other_mean).square().sum() + traces - 2 * shared))


def precision_recall(images: Tensor, samples: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision, the share of samples that lie among the images, and recall, the share of images among the samples.

    A point lies among a set of points if its distance to one of them is at most the distance from that one to its k-th
    nearest neighbour in the set: Kynkäänniemi et al. 2019, eq. 1 and 2.

    Args:
        images, samples: features, (count, features) float64, more than `neighbours` of each.
        neighbours: k, 3 in the paper.

    Raises:
        ValueError: there are too few images or samples.
    """
    if min(len(images), len(samples)) <= neighbours:
        raise ValueError(
            f"precision: got {len(samples)} samples and {len(images)} images, expected at least {neighbours + 1} of "
            f"both, since each is compared with its {neighbours} nearest neighbours of its own kind"
        )
    return _share_among(images, samples, neighbours), _share_among(samples, images, neighbours)


def _share_among(others: Tensor, points: Tensor, neighbours: int) -> float:
    """The share of the points that lie among the others."""
    rows = max(1, _DISTANCES // len(others))
    # Each point's nearest point is itself, so the k-th neighbour is the (k + 1)-th smallest distance.
    reach = torch.cat([torch.cdist(part, others).kthvalue(neighbours + 1).values for part in others.split(rows)])
    inside = sum(int((torch.cdist(part, others) <= reach).any(1).sum()) for part in points.split(rows))
    return inside / len(points)


def pixels(images: Tensor) -> Tensor:
    """The pixels of images, averaged to at most 16 by 16: features that need no download, for small images."""
    height, width = (min(side, _SIDE) for side in images.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(images, (height, width)).flatten(1)


def features_by_name(name: str) -> Features:
    """The function "pixels", the network "inception", or the function that "module:function" names.

    Raises:
        ValueError: there is no such function. MissingExtra: no package for "inception" is installed.
    """
    if name == _PIXELS:
        return pixels
    if name == inception.NAME:
        return inception.Inception()
    return import_by_name(name, "features", f"{_PIXELS}, {inception.NAME} or module:function", "a function")


def features_of(features: Features, name: str, images: Tensor, device: torch.device) -> Tensor:
    """The features of images, (batch, features) float64 on the CPU. The images' values are clipped to [-1, 1].

    Args:
        name: the name of the function of features, for an error message.

    Raises:
        ValueError: the features are not (batch, features), or not finite. UserCodeError: the function raises an
            exception.
    """
    clipped = images.to(device, torch.float32).clamp(-1, 1)
    with torch.no_grad():
        try:
            returned = features(clipped)
        except Exception as error:
            raise theirs("features", name, error) from error
        checked = torch.as_tensor(returned, device="cpu").detach().to(torch.float64)
    if checked.dim() != 2 or len(checked) != len(images) or not checked.shape[1]:
        raise ValueError(
            f"features: got shape {tuple(checked.shape)} for {len(images)} images, expected ({len(images)}, features)"
        )
    if not checked.isfinite().all():
        raise ValueError("features: got values that are not finite, expected finite numbers")
    return checked


class Scorer:
    """Scores samples by their Fréchet distance to at most 5,000 training images, taken evenly from all.

    Args:
        features: the function of features.
        images: the training images.
        options: score_count, batch_size, seed, skip_corrupt.
        device: the device of the images that `features` gets.
    """

    def __init__(self, features: Features, images: ImageSource, options: TrainOptions, device: torch.device) -> None:
        self.features, self.images, self.options, self.device = features, images, options, device
        self._reference: Moments | None = None

    def try_out(self) -> None:
        """Calls the function of features with two images of noise, so that its errors appear before the first step."""
        noise = torch.rand(2, *self.images.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        self._features_of(2 * noise - 1)

    def score(self, draw: Callable[[range], Tensor], ranks: Ranks) -> float:
        """The Fréchet distance of `score_count` samples. Each rank draws its part of them; all ranks return the same.

        draw: makes the samples with these ids, (samples, channels, height, width).

        Raises:
            ValueError: the features are not (batch, features), or not finite, or fewer than two images can be read.
            UserCodeError: the function of features raises an exception.
        """
        if self._reference is None:
            count = min(len(self.images), _REFERENCE)
            indices = (torch.arange(count, device="cpu") * len(self.images)) // count
            self._reference = self._moments(count, lambda part: self._read(indices[part.start : part.stop]), ranks)
        drawn = self._moments(self.options.score_count, draw, ranks)
        if drawn[0].shape != self._reference[0].shape:
            raise ValueError(
                f"features: got {len(drawn[0])} of samples and {len(self._reference[0])} of images, expected the same"
            )
        return frechet(drawn, self._reference)

    def _moments(self, count: int, make: Callable[[range], Tensor], ranks: Ranks) -> Moments:
        """The moments of the features of images 0 to count - 1. make(range) makes the images of a range."""
        rank_range = part_of(range(count), ranks.rank, ranks.size)
        most = max(1, self.options.batch_size // (ranks.size * self.options.accumulate))
        parts = [rank_range[first : first + most] for first in range(0, len(rank_range), most)]
        rank_features = [self._features_of(images) for images in map(make, parts) if len(images)]
        every = [features for of_rank in ranks.gather(rank_features) for features in of_rank]
        if sum(map(len, every)) < 2:
            raise ValueError(f"score: got {sum(map(len, every))} images, expected at least 2")
        sizes = sorted({features.shape[1] for features in every})
        if len(sizes) > 1:
            raise ValueError(
                f"features: got {sizes[0]} of some images and {sizes[1]} of others, expected as many of all"
            )
        return moments(torch.cat(every))

    def _features_of(self, images: Tensor) -> Tensor:
        return features_of(self.features, self.options.features, images, self.device)

    def _read(self, indices: Tensor) -> Tensor:
        """The training images at `indices`. With skip_corrupt, images that can't be read are left out."""
        seeds = [seed_for(self.options.seed, "reference", index) for index in indices.tolist()]
        try:
            return self.images.batch(indices, seeds if self.images.seeded else None)
        except DamagedImage:
            if not self.options.skip_corrupt:
                raise
        readable = []
        for index, seed in zip(indices, seeds, strict=True):
            with suppress(DamagedImage):
                readable.append(self.images.batch(index[None], [seed] if self.images.seeded else None))
        return torch.cat(readable) if readable else torch.empty(0, device="cpu")


class Scores:
    """The scores of a run by the step; the lowest is the best.

    by: the options on which a score depends, besides the weights. Scores by other options can't be compared, so a
        resume with other options drops the earlier scores.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.by = [options.features, options.score_count, options.sample_steps]
        self.of: dict[int, float] = {}

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the lowest score, the first such step, and the score; None if there are no scores."""
        return min(self.of.items(), key=lambda entry: (entry[1], entry[0]), default=None)

    def state(self) -> dict[str, Any]:
        """The state, as JSON."""
        return {"by": self.by, "of": list(self.of.items())}

    def restore(self, state: Any) -> None:
        """Restores the state that state() returned."""
        self.of = {int(step): float(score) for step, score in state["of"]} if state["by"] == self.by else {}
