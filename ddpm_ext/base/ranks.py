"""Several processes that share one task, as torchrun starts them: the rank of this process, and communication.

Ranks exchange objects over gloo, on the CPU. When samples are drawn, they communicate only at the start and at the end,
so that no GPU waits for another. Gradients of models on GPUs are averaged over NCCL.
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
from torch import Tensor, distributed
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_EXCHANGE = timedelta(minutes=30)  # the timeout of an exchange, long enough for a rank that is loading a model
# The timeout of wait_for_all, which is no limit in practice. A closed connection shows at once that a rank has died.
_WAIT = timedelta(days=365)
_POLL = 0.1  # seconds between two calls of wait_for_all's `meanwhile`
KEPT = "what was finished is kept: run the same command again to go on"
"""The end of the message of a run that ends before its work is done."""
_LOST = f"another rank ended before the work was done (its own message, if it had one, says why); {KEPT}"
# (Ranks, barrier) of each wait_for_all that an exception ended. They are never freed, since freeing a barrier waits for
# the other ranks.
_UNFINISHED: list[Any] = []


@dataclass(frozen=True)
class Ranks:
    """The numbers of this process: `rank` of `size` processes, and `local` on its machine. By default, it is alone."""

    rank: int = 0
    size: int = 1
    local: int = 0
    # _talk: the process group for exchanges, None for the default group. _at_the_end: the group of wait_for_all.
    _talk: Any = field(default=None, repr=False, compare=False)
    _at_the_end: Any = field(default=None, repr=False, compare=False)

    def device(self, name: str) -> str:
        """The device of this rank: `name`, except that "cuda" with several ranks is the local rank's GPU."""
        count = torch.cuda.device_count() if name == "cuda" and self.size > 1 else 0
        return f"cuda:{self.local % count}" if count else name

    def share(self, make: Callable[[], T]) -> T:
        """Calls make() on rank 0 only, and returns its result on all ranks.

        If make() raises an exception, rank 0 raises it, so that it is reported once; the other ranks raise
        SystemExit(2). If another rank's process ends or can't be reached, this raises ConnectionError.
        """
        if self.size == 1:
            return make()
        success_and_result: list[Any] = [False, None]
        failure = None
        if self.rank == 0:
            try:
                success_and_result = [True, make()]
            except Exception as error:
                failure = error
        with _lost_ranks():
            distributed.broadcast_object_list(success_and_result, group=self._talk)
        if failure is not None:
            raise failure
        if not success_and_result[0]:
            raise SystemExit(2)
        return success_and_result[1]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in their order, on each rank. Raises ConnectionError if a rank is lost."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_ranks():
            distributed.all_gather_object(values, value, group=self._talk)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Sums a tensor on the CPU over all ranks, in place. Raises ConnectionError if a rank is lost."""
        if self.size > 1:
            with _lost_ranks():
                distributed.all_reduce(values, group=self._talk)
        return values

    def largest(self, value: int) -> int:
        """Returns the largest of the values of all ranks, on each rank. Raises ConnectionError if a rank is lost."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device="cpu")
        with _lost_ranks():
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._talk)
        return int(largest)

    def parallel(self, model: Module, device: torch.device) -> Module:
        """Wraps a model so that the gradients of all ranks are averaged in each backward pass.

        With several ranks the result is a DistributedDataParallel, over NCCL on GPUs, and the model of each rank gets
        the weights of rank 0. A single process gets `model` itself.
        """
        if self.size == 1:
            return model
        cuda = device.type == "cuda"
        with _lost_ranks():
            group = distributed.new_group(backend="nccl") if cuda else self._talk
            return DistributedDataParallel(model, [device] if cuda else None, process_group=group)

    @contextmanager
    def in_touch(self) -> Iterator[None]:
        """Converts errors of the block about lost ranks to a ConnectionError.

        It is for code that communicates without the methods of this class, such as a backward pass.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                raise
            raise ConnectionError(_LOST) from error

    def wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        """Waits until every rank has called this method. While it waits, it calls `meanwhile` every 0.1 seconds.

        Raises ConnectionError as soon as a rank is lost, and any exception of `meanwhile`.
        """
        if self.size == 1:
            return
        with _lost_ranks():
            work = distributed.barrier(self._at_the_end, async_op=True)
        try:
            while not work.is_completed():
                meanwhile()
                time.sleep(_POLL)
        except BaseException:
            _UNFINISHED.append((self, work))
            raise
        with _lost_ranks():
            work.wait()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Converts RuntimeErrors of torch.distributed, which are about sockets, to a ConnectionError with advice."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(_LOST) from error


def ranks() -> Ranks:
    """The Ranks of this process, from the environment variables that torchrun sets. Without these it is alone.

    Raises:
        ValueError: WORLD_SIZE, RANK or LOCAL_RANK is no whole number, is missing, or does not fit the others.
    """
    size = _number("WORLD_SIZE", 1, 1, 2**31)
    rank = _number("RANK", 0 if size == 1 else None, 0, size)
    return Ranks(rank, size, _number("LOCAL_RANK", rank, 0, size))


def _number(name: str, default: int | None, low: int, high: int) -> int:
    """The whole number in an environment variable; `default` if the variable is not set.

    Raises ValueError if the number is not in [low, high), or if the variable is not set and `default` is None.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or not low <= int(text) < high:
        got = "nothing" if text is None else text
        raise ValueError(f"{name}: got {got} in the environment, expected a whole number in [{low}, {high})")
    return int(text)


def part_of(samples: range, part: int, parts: int) -> range:
    """Part number `part`, from 0, of `samples`, which is divided into `parts` parts whose sizes differ by at most 1."""
    count = len(samples)
    return range(samples.start + count * part // parts, samples.start + count * (part + 1) // parts)


@contextmanager
def join() -> Iterator[Ranks]:
    """Yields the Ranks of this process. Several ranks have a process group while the block runs.

    If the caller has initialized torch.distributed, its process group is not destroyed at the end.

    Raises:
        ValueError: WORLD_SIZE, RANK or LOCAL_RANK is no whole number, is missing, or does not fit the others.
        ConnectionError: the other ranks don't start.
    """
    process_ranks = ranks()
    if process_ranks.size == 1:
        yield process_ranks
        return
    if distributed.is_initialized():  # new groups, since the caller's group may be for tensors on GPUs only
        talk, at_the_end = (distributed.new_group(backend="gloo", timeout=timeout) for timeout in (_EXCHANGE, _WAIT))
        yield replace(process_ranks, _talk=talk, _at_the_end=at_the_end)
        return
    with _lost_ranks():
        distributed.init_process_group("gloo", timeout=_EXCHANGE)
        process_ranks = replace(process_ranks, _at_the_end=distributed.new_group(timeout=_WAIT))
    try:
        yield process_ranks
    finally:
        distributed.destroy_process_group()
