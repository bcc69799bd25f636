"""The images of each training step. They depend only on the seed and the step, not on earlier reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ddpm_ext.base.seeds import generator, seed_for
from ddpm_ext.training.data import DamagedImage, ImageSource, Labels
from ddpm_ext.training.options import TrainOptions

_PREFETCHED = 4  # batches that a worker reads ahead
_BATCH_TIMEOUT = 600  # the seconds after which a batch that has not arrived is an error
_SHARED_MEMORY = "shared memory in /dev/shm"


class Batch(NamedTuple):
    """One rank's images of a step.

    images: (samples, channels, height, width) float32.
    skipped: the error messages of images that could not be read.
    labels: the images' classes, (samples,) int64, or None for images without classes. The null class replaces a random
        share of the labels, which the option class_dropout sets.
    """

    images: Tensor
    skipped: list[str]
    labels: Tensor | None = None


class StepBatches(Dataset):
    """batches[step] is one rank's part of the step's batch, or the OSError, TypeError or ValueError of reading it.

    Each epoch has all images once, in a random order; a batch may contain the end of one epoch and the beginning of the
    next. With `options.skip_corrupt`, an image that can't be read is replaced by the source's next readable image.

    Args:
        images: the source.
        options: batch size, seed, flip, skip_corrupt, workers, class_dropout.
        start, stop: this rank reads the samples from `start` to `stop` - 1 of each batch.
        labels: the classes of the images. With None, batches have no labels. The number of the null class is the number
            of classes.
    """

    def __init__(
        self, images: ImageSource, options: TrainOptions, start: int, stop: int, labels: Labels | None = None
    ) -> None:
        self.images, self.options, self.start, self.stop, self.labels = images, options, start, stop, labels
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def __getitem__(self, step: int) -> Batch | Exception:
        # An exception is returned, and iterate() raises it. If a worker raised it, the DataLoader would put the
        # worker's traceback into the message.
        try:
            batch = self._read(step)
            if get_worker_info() is not None:
                # The tensors are moved to shared memory here, where an error can be returned. Otherwise a thread of the
                # DataLoader would move them. If shared memory is full, this thread only prints an error, and training
                # waits forever.
                with _explain_full_shared_memory():
                    for tensor in (batch.images, batch.labels):
                        tensor is None or tensor.share_memory_()
            return batch
        except (OSError, TypeError, ValueError) as error:
            return error

    @contextmanager
    def reading(self, start: int, stop: int, device: torch.device) -> Iterator[Generator[Batch, None, None]]:
        """Opens iterate() for a `with` block. The end of the block stops the worker processes.

        If a worker dies, torch's signal handler may raise a RuntimeError at any line of the block, not only while the
        loop waits for a batch. This context manager turns it into a ChildProcessError.
        """
        with _translate_loader_errors(), closing(self.iterate(start, stop, device)) as batches:
            yield batches

    def iterate(self, start: int, stop: int, device: torch.device) -> Generator[Batch, None, None]:
        """Reads the batches of the steps from `start` to `stop` - 1, ahead of time in `options.workers` processes.

        Raises:
            OSError, TypeError, ValueError: an image can't be read, or has a wrong type or shape, or shared memory is
                full.
            TimeoutError: the workers returned no batch for ten minutes.
            ChildProcessError: a worker died.
        """
        workers = self.options.workers
        steps = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            timeout=_BATCH_TIMEOUT if workers else 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise the loader would draw its workers' seed from torch's generator
        )
        with _translate_loader_errors():
            # The loader draws its workers' seed on torch's default device, which must be that of `generator`.
            with torch.device("cpu"), _explain_full_shared_memory():
                if workers:
                    # If shared memory is full, this queue raises the error before the DataLoader makes its own queues.
                    # A DataLoader that fails there would also print a traceback.
                    torch.multiprocessing.Queue()
                batches = iter(steps)
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                yield batch

    def _read(self, step: int) -> Batch:
        """Reads this rank's part of a step's batch."""
        options = self.options
        batch_start = step * options.batch_size
        positions = range(batch_start + self.start, batch_start + self.stop)
        indices = self._indices(positions)
        seeds = [seed_for(options.seed, "images", position) for position in positions] if self.images.seeded else None
        skipped: list[str] = []
        try:
            images = self.images.batch(indices, seeds)
        except DamagedImage:
            if not options.skip_corrupt:
                raise
            replacements = [self._next_readable(i, indices, seeds, skipped) for i in range(len(indices))]
            images, indices = (
                torch.cat([image for image, _ in replacements]),
                torch.cat([index for _, index in replacements]),
            )
        if options.flip:
            images = torch.where(self._random_mask("flip", step, 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.labels is None:
            return Batch(images, skipped)
        dropped = self._random_mask("class dropout", step, options.class_dropout)
        return Batch(images, skipped, self.labels.numbers[indices].masked_fill(dropped, len(self.labels.names)))

    def _random_mask(self, purpose: str, step: int, share: float) -> Tensor:
        """A random mask over this rank's samples, (samples,) bool: each is true with the probability `share`."""
        step_generator = generator(self.options.seed, purpose, step)
        uniform = torch.rand(self.options.batch_size, generator=step_generator, dtype=torch.float32, device="cpu")
        return uniform[self.start : self.stop] < share

    def _indices(self, positions: range) -> Tensor:
        """The indices of the images at these positions in the sequence of all epochs.

        The sequence has the shuffled images of epoch 0, then the shuffled images of epoch 1, and so on.
        """
        count, position, parts = len(self.images), positions.start, []
        while position < positions.stop:
            epoch, offset = divmod(position, count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = torch.randperm(
                    count, generator=generator(self.options.seed, "order", epoch), device="cpu"
                )
            parts.append(self._order[offset : offset + positions.stop - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def _next_readable(
        self, i: int, indices: Tensor, seeds: list[int] | None, skipped: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Reads the image indices[i] or, if that can't be read, the next readable image of the source.

        Appends the error messages of unreadable images to `skipped`.

        Returns:
            The image, (1, channels, height, width), and its index, (1,).

        Raises:
            ValueError: no image of the source can be read.
        """
        count = len(self.images)
        for ahead in range(count):
            index = (indices[i : i + 1] + ahead) % count
            try:
                return self.images.batch(index, None if seeds is None else seeds[i : i + 1]), index
            except DamagedImage as error:
                skipped.append(str(error))
        raise ValueError(f"data: none of the {count} images can be read, the last because: {skipped[-1]}")


@contextmanager
def _explain_full_shared_memory() -> Iterator[None]:
    """If the block fails because shared memory is full, raises an OSError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(
            f"data: the {_SHARED_MEMORY} is full, through which workers hand over batches; expected more of it (docker "
            "run --shm-size enlarges it), or workers=0"
        ) from error


@contextmanager
def _translate_loader_errors() -> Iterator[None]:
    """Turns a DataLoader's errors about its workers into a TimeoutError or ChildProcessError that says what to do.

    The DataLoader raises RuntimeError for both, so the message decides. Other RuntimeErrors pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if text.startswith("DataLoader timed out"):
            raise TimeoutError(
                f"data: the workers gave no batch for {_BATCH_TIMEOUT} s; expected data that can be read, or workers=0"
            ) from error
        if text.startswith("DataLoader worker"):
            raise ChildProcessError(
                f"data: a worker died ({text}); expected more memory or more {_SHARED_MEMORY}, or workers=0"
            ) from error
        raise
