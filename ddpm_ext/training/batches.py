"""The images of each step: a function of the seed and the step, whoever asks, in whatever order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm_ext.base.seeds import generator, seed_for
from ddpm_ext.training.data import DamagedImage, Images
from ddpm_ext.training.options import TrainOptions

__all__ = ["Batch", "StepBatches"]


class Batch(NamedTuple):
    """One rank's images of a step, (rows, channels, height, width) float32, and what was skipped to get them."""

    images: Tensor
    skipped: list[str]


class StepBatches(Dataset):
    """batches[step]: the images of rows `first` to `last` - 1 of the step's batch, or the exception at reading them.

    The set is gone through in an order drawn anew each time, across batches' borders. With `options.skip_corrupt` an
    image that can't be read is replaced by the next in the set's own order that can be.
    """

    def __init__(self, images: Images, options: TrainOptions, first: int, last: int) -> None:
        self.images, self.options, self.first, self.last = images, options, first, last
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Batch | Exception:
        # An exception that crosses processes as one is buried in that process's traceback.
        try:
            batch = self._read(step)
        except (OSError, TypeError, ValueError) as error:
            return error
        return batch

    def iterate(self, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
        """The batches of the steps from `start` to `stop` - 1, read ahead by `options.workers` processes if any.

        Raises ValueError or TypeError for what can't be read.
        """
        workers = self.options.workers
        steps = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # of the workers' base seed: it is not to be taken from the caller's
        )
        for batch in steps:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _read(self, step: int) -> Batch:
        options = self.options
        start = step * options.batch_size
        places = range(start + self.first, start + self.last)
        indices = self._indices(places)
        seeds = [seed_for(options.seed, "images", place) for place in places] if self.images.seeded else None
        skipped: list[str] = []
        try:
            images = self.images.batch(indices, seeds)
        except DamagedImage:
            if not options.skip_corrupt:
                raise
            images = torch.cat([self._next_good(row, indices, seeds, skipped) for row in range(len(indices))])
        if options.flip:
            mirrored = torch.rand(options.batch_size, generator=generator(options.seed, "flip", step)) < 0.5
            images = torch.where(mirrored[self.first : self.last].view(-1, 1, 1, 1), images.flip(3), images)
        return Batch(images, skipped)

    def _indices(self, places: range) -> Tensor:
        """Which images stand at these places of the endless row of them."""
        count, place, parts = len(self.images), places.start, []
        while place < places.stop:
            epoch, within = divmod(place, count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = torch.randperm(count, generator=generator(self.options.seed, "order", epoch))
            parts.append(self._order[within : within + places.stop - place])
            place += len(parts[-1])
        return torch.cat(parts)

    def _next_good(self, row: int, indices: Tensor, seeds: list[int] | None, skipped: list[str]) -> Tensor:
        """(1, channels, height, width)"""
        count = len(self.images)
        for ahead in range(count):
            index = (indices[row : row + 1] + ahead) % count
            try:
                return self.images.batch(index, None if seeds is None else seeds[row : row + 1])
            except DamagedImage as error:
                skipped.append(str(error))
        raise ValueError(f"data: none of the {count} images can be read, the last because: {skipped[-1]}")


_AHEAD = 4  # batches that a worker reads ahead
