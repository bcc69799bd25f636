"""Some elements of tensors that are too large for memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from support.cuda_host.calls import SAMPLES, Call, Host, Variant, assert_same_bits, make_call, values
from support.cuda_host.guarded import Sparse
from torch import Tensor

ITEMS = (4, 8)  # how many consecutive elements a thread may take


def index(shape: Sequence[int], b: int, elements: Tensor) -> tuple[Tensor, ...]:
    """Of elements of sample b, numbered in C order."""
    where = []
    for size in reversed(shape[1:]):
        where.append(elements % size)
        elements = elements // size
    return torch.tensor(b), *reversed(where)


def around(samples: Iterable[int], numbers: Iterable[int], numel: int) -> list[tuple[int, int, int]]:
    """(sample, begin, end) of the elements around these numbers, none of them twice."""
    places = []
    for b in sorted(set(samples)):
        last = 0
        for j in sorted(numbers):
            begin, end = max(last, j - 600), min(numel, j + 600)
            if begin < end:
                places.append((b, begin, end))
                last = end
    return places


class Windows:
    def __init__(self) -> None:
        self.rooms = {name: Sparse(2**34 + 64) for name in (*SAMPLES, "out")}

    def check(
        self,
        host: Host,
        variant: Variant,
        shape: Sequence[int],
        strides: Mapping[str, Sequence[int]],
        offsets: Mapping[str, int],
        places: Sequence[tuple[int, int, int]],
    ) -> None:
        """That elements begin to end of sample b are right, for (b, begin, end) in places.

        Only the blocks that these elements can be in are run. Strides are by the tensors' names, "out" for those that
        are not named; offsets, where a tensor begins, too.
        """
        changes = {"t": None, "t_index": 1, "draw": 2**32 - 9, "first_id": 2**55}
        call, gpu = make_call(variant, 1, 1, **changes)
        tensors = {
            name: room.tensor(tensor.dtype, shape, strides.get(name, strides["out"]), offsets.get(name, 0))
            for name, room in self.rooms.items()
            if (tensor := call.x if name == "out" else getattr(call, name)) is not None
        }
        call = call.with_tensors(lambda name, _: tensors[name])
        expected = []
        for b, begin, end in places:
            where = index(shape, b, torch.arange(begin, end))
            tensors["out"][where] = math.nan
            small = self.small(host, make_call(variant, 1, end - begin, **changes)[0], b, begin)
            for name in SAMPLES:
                if name in tensors:
                    tensors[name][where] = getattr(small, name)[0].to(tensors[name].dtype)
            expected.append((where, small.on_cpu()[0].to(call.x.dtype)))

        arguments = replace(call, seed=~call.seed if gpu else call.seed).arguments(tensors["out"])
        run = getattr(host.operators, call.op)
        host.control.instead(None, None, gpu.get("seed"), None, None)
        try:
            host.control.take_launches()
            host.control.set_blocks([])
            run(*arguments)
            (launch,) = host.control.take_launches()
            host.control.set_blocks(self.blocks(launch, places))
            run(*arguments)
        finally:
            host.control.instead(None, None, None, None, None)
            host.control.set_blocks(None)
        for where, truth in expected:
            assert_same_bits(tensors["out"][where], truth, f"{call} {launch} {offsets}")

    @staticmethod
    def small(host: Host, call: Call, b: int, begin: int) -> Call:
        """The same of these elements alone, in float32 where noise is drawn: that is what it is drawn in."""
        n = call.x.shape[1]
        call = call.with_tensors(lambda name, x: values(1, n, seed=begin % 97 + len(name), dtype=x.dtype))
        if not call.drawn:
            return call
        z = host.control.normals(call.seed % 2**64, call.first_id + b, 0, call.draw, begin // 4, n // 4 + 2)
        noise = torch.tensor(z)[begin % 4 :][:n].view(1, n)
        return replace(call, x=call.x.float(), noise=noise, drawn=False)

    @staticmethod
    def blocks(launch: tuple[Sequence[int], Sequence[int]], places: Sequence[tuple[int, int, int]]) -> list[int]:
        """Blocks take elements along x and samples along y, then z; where a grid ends, they go on at its start."""
        (gx, gy, gz), (bx, by, _) = launch
        numbers = set()
        for b, begin, end in places:
            row = b // by
            for items in ITEMS:
                for x in range(begin // (bx * items), (end - 1) // (bx * items) + 1):
                    numbers.add(x % gx + gx * (row % gy + gy * (row // gy % gz)))
        return sorted(numbers)
