"""The folder of a run of many samples, which are numbered from 0 to count - 1.

The samples are divided into shards of consecutive numbers. The division depends neither on the number of ranks nor on
the batch size. In the folder:

    manifest.json                       the settings that determine the samples; written first
    shards/000000000-000000511.npy      uint8 (samples, height, width, channels); a file that exists is complete
    shards/000000000-000000511.not_finite.json    the numbers of the shard's samples that had NaN or infinities before
                                        they became pixels; the file is missing if there are none
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpm_ext.base import files

MANIFEST = "manifest.json"
SHARD_SIZE = 512  # the default number of samples in a shard
_NOT_FINITE = ".not_finite.json"
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shards:
    """The samples 0 to `count` - 1 of a run, in files of `size` samples. The last file may have fewer.

    Args:
        shape: (height, width, channels) of a sample.

    Examples:
        >>> from pathlib import Path
        >>> from ddpm_ext.bulk.shards import Shards
        >>> shards = Shards(Path("many"), count=6, size=4, shape=(8, 8, 3))
        >>> len(shards.missing())  # files of up to four samples
        2
    """

    folder: Path
    count: int
    size: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return -(-self.count // self.size)

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    @property
    def inside(self) -> Path:
        """The folder of the shards' files."""
        return self.folder / "shards"

    def ids(self, index: int) -> range:
        """The numbers of the samples in a shard."""
        return range(index * self.size, min((index + 1) * self.size, self.count))

    def path(self, index: int) -> Path:
        """The path of a shard's file."""
        ids = self.ids(index)
        return self.inside / f"{ids[0]:09d}-{ids[-1]:09d}.npy"

    def missing(self) -> list[int]:
        """The numbers of the shards that have not been written yet."""
        return [index for index in range(len(self)) if not self.path(index).exists()]

    def write(self, index: int, images: Pixels, not_finite: Sequence[int] = ()) -> None:
        """Writes a shard, atomically, and the numbers of its samples that had NaN or infinities.

        Raises:
            ValueError: images is not uint8 (samples, height, width, channels).
        """
        self._check(index, images, "draw gave")
        numbers_path = self.path(index).with_suffix(_NOT_FINITE)
        if not_finite:  # the numbers are written before the shard, since a shard that exists counts as complete
            files.write_json(numbers_path, list(not_finite))
        else:
            numbers_path.unlink(missing_ok=True)
        files.write_array(self.path(index), images)

    def remove(self, index: int) -> None:
        """Removes a shard, if it exists, and the list of its samples that were not finite."""
        self.path(index).unlink(missing_ok=True)
        self.path(index).with_suffix(_NOT_FINITE).unlink(missing_ok=True)

    def read(self, index: int) -> Pixels:
        """A shard's samples, memory-mapped. Raises ValueError if the file is damaged or holds something else."""
        path = self.path(index)
        try:
            images = np.load(path, mmap_mode="r")
            if not isinstance(images, np.ndarray):
                raise ValueError("an archive of several arrays")
        except (ValueError, EOFError) as error:
            reason = "no file of numpy's" if "pickle" in str(error) else error
            raise ValueError(f"out: {path} is damaged ({reason}); remove it, and it is drawn again") from error
        self._check(index, images, f"out: {path} holds")
        return images

    def not_finite(self) -> list[int]:
        """The numbers of all samples that were not finite. Raises ValueError if a list of them is damaged."""
        numbers: list[int] = []
        for path in sorted(self.inside.glob(f"[0-9]*{_NOT_FINITE}")):
            try:
                numbers += map(int, files.read_json(path))
            except (ValueError, TypeError) as error:
                raise ValueError(f"out: {path} is no list of samples") from error
        return numbers

    def images(self) -> Iterator[Pixels]:
        """All samples in order, a memory-mapped shard at a time."""
        return map(self.read, range(len(self)))

    def _check(self, index: int, images: Pixels, source: str) -> None:
        expected = (len(self.ids(index)), *self.shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"{source} {images.dtype} of shape {images.shape}, expected uint8 of shape {expected}")
