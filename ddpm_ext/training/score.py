"""Scores of samples: Fréchet distance to images (Heusel et al. 2017, eq. 6), precision and recall.

Scorer scores the samples of a training run, and Scores stores the scores of its steps."""

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
from ddpm_ext.training.import_by_name import import_by_name, user_code_error
from ddpm_ext.training.options import TrainOptions

Features = Callable[[Tensor], Any]
"""A function of images, (batch, channels, height, width) float32 in [-1, 1] on the run's device, that returns features,
(batch, features)."""

_PIXELS = "pixels"
# Larger images are averaged down to this side, since the covariance matrix has a row and a column for each value.
_LARGEST_SIDE = 16
_DISTANCES = 2**23  # the most distances that are computed at a time
_REFERENCE = 5000  # the most training images that samples are compared with


Moments = tuple[Tensor, Tensor]
"""The mean of features, (features,), and a factor A of their covariance, (rows, features): the covariance is A^T A."""


def moments(features: Tensor) -> Moments:
    """The moments of features, (count, features) float64 with count at least 2. Their factor has at most `features`
    rows."""
    count, size = features.shape
    mean = features.mean(0)
    factor = (features - mean) / (count - 1) ** 0.5
    return mean, torch.linalg.qr(factor, mode="r").R if count > size else factor


def frechet(first: Moments, second: Moments) -> float:
    """The squared Fréchet distance of two Gaussians: |m - n|^2 + tr(C + D - 2 (C D)^(1/2)).

    m and n are the means, C and D the covariances. With C = A^T A and D = B^T B, the eigenvalues of C D are the squared
    singular values of A B^T. Singular values are real for matrices of any rank, so fewer samples than features are
    enough.
    """
    (mean, factor), (second_mean, second_factor) = first, second
    traces = factor.square().sum() + second_factor.square().sum()
    shared_trace = torch.linalg.svdvals(factor @ second_factor.T).sum()
    return max(0.0, float((mean - second_mean).square().sum() + traces - 2 * shared_trace))


def precision_recall(images: Tensor, samples: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Computes the precision and the recall of samples (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Precision is the share of the samples that lie among the images. Recall is the share of the images that lie among
    the samples. A point lies among a set if, for some member of the set, the point is at most as far from the member as
    the member's k-th nearest neighbour in the set.

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


def _share_among(population: Tensor, points: Tensor, neighbours: int) -> float:
    """The share of `points` that lie among the set `population`.

    A point does if it is at most as far from some member of the set as that member's k-th nearest neighbour in the set,
    with k = `neighbours`.
    """
    rows = max(1, _DISTANCES // len(population))
    # Each point's nearest point is itself, so the k-th neighbour is the (k + 1)-th smallest distance.
    reach = torch.cat(
        [torch.cdist(part, population).kthvalue(neighbours + 1).values for part in population.split(rows)]
    )
    inside = sum(int((torch.cdist(part, population) <= reach).any(1).sum()) for part in points.split(rows))
    return inside / len(points)


def pixels(images: Tensor) -> Tensor:
    """The pixels of images, averaged to at most 16 by 16: features that need no download, for small images."""
    height, width = (min(side, _LARGEST_SIDE) for side in images.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(images, (height, width)).flatten(1)


def features_by_name(name: str) -> Features:
    """The function "pixels", the network "inception", or the function that "module:function" names.

    Raises:
        ValueError: there is no such function, or the weights of "inception" can't be loaded.
        MissingExtra: no package for "inception" is installed.
        UserCodeError: the user's module raises an exception.
    """
    if name == _PIXELS:
        return pixels
    if name == inception.NAME:
        return inception.Inception()
    return import_by_name(name, "features", f"{_PIXELS}, {inception.NAME} or module:function", "a function")


def features_of(features: Features, name: str, images: Tensor, device: torch.device) -> Tensor:
    """The features of images, (batch, features) float64 on the CPU. The images' values are clipped to [-1, 1].

    Args:
        name: the name of the function `features`, for error messages.

    Raises:
        ValueError: the features are not (batch, features), or not finite.
        UserCodeError: the function raises an exception.
    """
    clipped = images.to(device, torch.float32).clamp(-1, 1)
    with torch.no_grad():
        try:
            returned = features(clipped)
        except Exception as error:
            raise user_code_error("features", name, error) from error
        checked = torch.as_tensor(returned, device="cpu").detach().to(torch.float64)
    if checked.dim() != 2 or len(checked) != len(images) or not checked.shape[1]:
        raise ValueError(
            f"features: got shape {tuple(checked.shape)} for {len(images)} images, expected ({len(images)}, features)"
        )
    if not checked.isfinite().all():
        raise ValueError("features: got values that are not finite, expected finite numbers")
    return checked


class Scorer:
    """Scores samples by their Fréchet distance to training images.

    If there are more than 5,000 training images, 5,000 of them are used, at equal distances in the data.

    Args:
        features: computes the features of images (see Features).
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
        """The Fréchet distance of `score_count` samples to the training images, the same on all ranks.

        Each rank draws a part of the samples.

        draw: makes the samples with the ids in its argument, (samples, channels, height, width).

        Raises:
            ValueError: the features are not (batch, features), not finite, or not equally many for all images; or a
                training image can't be read (with skip_corrupt: fewer than two of them can be read).
            UserCodeError: the function of features raises an exception.
        """
        if self._reference is None:
            count = min(len(self.images), _REFERENCE)
            indices = (torch.arange(count, device="cpu") * len(self.images)) // count
            self._reference = self._moments(count, lambda part: self._read(indices[part.start : part.stop]), ranks)
        sample_moments = self._moments(self.options.score_count, draw, ranks)
        if sample_moments[0].shape != self._reference[0].shape:
            raise ValueError(
                f"features: got {len(sample_moments[0])} of samples and {len(self._reference[0])} of images, expected "
                "the same"
            )
        return frechet(sample_moments, self._reference)

    def _moments(self, count: int, make: Callable[[range], Tensor], ranks: Ranks) -> Moments:
        """The moments of the features of images 0 to count - 1. Each rank makes a part of the images by make(range)."""
        rank_range = part_of(range(count), ranks.rank, ranks.size)
        largest_batch = max(1, self.options.batch_size // (ranks.size * self.options.accumulate))
        parts = [rank_range[first : first + largest_batch] for first in range(0, len(rank_range), largest_batch)]
        rank_features = [self._features_of(images) for images in map(make, parts) if len(images)]
        all_features = [features for features_of_rank in ranks.gather(rank_features) for features in features_of_rank]
        if sum(map(len, all_features)) < 2:
            raise ValueError(f"score: got {sum(map(len, all_features))} images, expected at least 2")
        sizes = sorted({features.shape[1] for features in all_features})
        if len(sizes) > 1:
            raise ValueError(
                f"features: got {sizes[0]} of some images and {sizes[1]} of others, expected as many of all"
            )
        return moments(torch.cat(all_features))

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
    """The scores of a run. The lowest score is the best.

    compared_options: the values of the options on which a score depends. Scores by other values can't be compared, so a
        resume with other values drops the earlier scores.
    by_step: {step: score}.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.compared_options = [options.features, options.score_count, options.sample_steps]
        self.by_step: dict[int, float] = {}

    @property
    def best(self) -> tuple[int, float] | None:
        """The first step with the lowest score, and the score; None if there are no scores."""
        return min(self.by_step.items(), key=lambda entry: (entry[1], entry[0]), default=None)

    def state(self) -> dict[str, Any]:
        """The state, as JSON."""
        return {"by": self.compared_options, "of": list(self.by_step.items())}

    def restore(self, state: Any) -> None:
        """Restores the state that state() returned."""
        self.by_step = (
            {int(step): float(score) for step, score in state["of"]} if state["by"] == self.compared_options else {}
        )
