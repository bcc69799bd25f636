"""Several processes at one task, as torchrun starts them: which one this is, and the little that they tell each other.

They talk over gloo, on the CPU; where they sample, only at the start and at the end of the work, so that no GPU waits
for another. Gradients of models on GPUs are averaged over NCCL.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["Ranks", "join", "ranks"]

T = TypeVar("T")

_MEETING = timedelta(minutes=30)  # for all to be there at the start, models loaded
_WORK = timedelta(days=365)  # a rank that dies is noticed at once, by its closed connections
_POLL = 0.1
_LOST = (
    "another rank ended before the work was done (its own message, if it had one, says why); "
    "what was finished is kept: run the same command again to go on"
)


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `size`, and `local` among those of its machine. By default one alone."""

    rank: int = 0
    size: int = 1
    local: int = 0
    _talk: Any = field(default=None, repr=False, compare=False)  # the process group for words; None: the default one
    _at_the_end: Any = field(default=None, repr=False, compare=False)  # a process group that waits for the work

    def device(self, name: str) -> str:
        """`name`, but for a plain "cuda" among several ranks: then each takes the GPU of its local rank."""
        count = torch.cuda.device_count() if name == "cuda" and self.size > 1 else 0
        return f"cuda:{self.local % count}" if count else name

    def share(self, make: Callable[[], T]) -> T:
        """What make() returns on rank 0, on all ranks.

        Where it raises on rank 0, the exception is rank 0's alone to tell: the others end with SystemExit(2).
        Raises ConnectionError if a rank is lost.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [False, None]
        failure = None
        if self.rank == 0:
            try:
                box = [True, make()]
            except Exception as error:
                failure = error
        from torch import distributed

        with _lost_ranks():
            distributed.broadcast_object_list(box, group=self._talk)
        if failure is not None:
            raise failure
        if not box[0]:
            raise SystemExit(2)
        return box[1]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all ranks. Raises ConnectionError if a rank is lost."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        with _lost_ranks():
            distributed.all_gather_object(values, value, group=self._talk)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the CPU, written to it. Raises ConnectionError if a rank is lost."""
        if self.size > 1:
            from torch import distributed

            with _lost_ranks():
                distributed.all_reduce(values, group=self._talk)
        return values

    def parallel(self, model: Module, device: torch.device) -> Module:
        """`model`, with all ranks' gradients averaged after each backward pass; rank 0's weights for all.

        Among several ranks this is a DistributedDataParallel, over NCCL on GPUs.
        """
        if self.size == 1:
            return model
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        cuda = device.type == "cuda"
        with _lost_ranks():
            group = distributed.new_group(backend="nccl") if cuda else self._talk
            return DistributedDataParallel(model, [device] if cuda else None, process_group=group)

    @contextmanager
    def in_touch(self) -> Iterator[None]:
        """Around what talks to other ranks by itself: a lost rank becomes a ConnectionError, as elsewhere."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                raise
            raise ConnectionError(_LOST) from error

    def wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        """Returns when every rank is here, and calls `meanwhile` from time to time until then.

        Raises ConnectionError as soon as a rank is lost, and whatever `meanwhile` raises.
        """
        if self.size == 1:
            return
        from torch import distributed

        with _lost_ranks():
            work = distributed.barrier(self._at_the_end, async_op=True)
        while not work.is_completed():
            meanwhile()
            time.sleep(_POLL)
        with _lost_ranks():
            work.wait()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """torch.distributed's RuntimeErrors, which speak of sockets, as one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(_LOST) from error


def ranks() -> Ranks:
    """This process's place, by the environment that torchrun sets; alone without one.

    Raises ValueError if WORLD_SIZE, RANK and LOCAL_RANK make no sense.
    """
    size = _number("WORLD_SIZE", 1, 1, 2**31)
    rank = _number("RANK", 0 if size == 1 else None, 0, size)
    return Ranks(rank, size, _number("LOCAL_RANK", rank, 0, size))


def _number(name: str, default: int | None, low: int, high: int) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or not low <= int(text) < high:
        came = "nothing" if text is None else text
        raise ValueError(f"{name}: got {came} in the environment, expected a whole number in [{low}, {high})")
    return int(text)


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks of this run, with a process group around the block if there are several; one that is there is used.

    Raises ValueError for an environment that makes no sense, ConnectionError if the others don't come.
    """
    here = ranks()
    if here.size == 1:
        yield here
        return
    from torch import distributed

    if distributed.is_initialized():  # by the caller, who ends it, too; theirs may be one of GPUs alone
        talk, at_the_end = (distributed.new_group(backend="gloo", timeout=timeout) for timeout in (_MEETING, _WORK))
        yield replace(here, _talk=talk, _at_the_end=at_the_end)
        return
    with _lost_ranks():
        distributed.init_process_group("gloo", timeout=_MEETING)
        here = replace(here, _at_the_end=distributed.new_group(timeout=_WORK))
    try:
        yield here
    finally:
        distributed.destroy_process_group()
