"""Checks some elements of results whose tensors are too large for memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from support.cuda_host.calls import Call, Host, Variant, assert_same_bits, make_call, values
from support.cuda_host.guarded import Sparse
from torch import Tensor

ITEMS = (4, 8)  # the numbers of consecutive elements that a thread may take


def index(shape: Sequence[int], b: int, elements: Tensor) -> tuple[Tensor, ...]:
    """The indices of elements of sample b. `elements` are their numbers in C order."""
    where = []
    for size in reversed(shape[1:]):
        where.append(elements % size)
        elements = elements // size
    return torch.tensor(b), *reversed(where)


def around(samples: Iterable[int], numbers: Iterable[int], numel: int) -> list[tuple[int, int, int]]:
    """Ranges (sample, begin, end) of elements around these numbers, without overlaps."""
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
        self.rooms = {name: Sparse(2**34 + 64) for name in ("x_t", "model_output", "noise", "out")}

    def check(
        self,
        host: Host,
        variant: Variant,
        shape: Sequence[int],
        strides: Mapping[str, Sequence[int]],
        offsets: Mapping[str, int],
        places: Sequence[tuple[int, int, int]],
    ) -> None:
        """Checks elements begin to end of sample b, for each (b, begin, end) in places.

        Runs only the blocks that may have these elements. strides: by the tensors' names; "out" is for tensors that are
        not named. offsets: where a tensor begins, by its name, by default 0.
        """
        changes = {"t": None, "t_index": 1, "draw": 2**32 - 9, "first_id": 2**55}
        call = make_call(variant, 1, 1, **changes)
        like = {**call.tensors, "out": call.x}
        tensors = {
            name: self.rooms[name].tensor(tensor.dtype, shape, strides.get(name, strides["out"]), offsets.get(name, 0))
            for name, tensor in like.items()
        }
        out = tensors.pop("out")
        call = replace(call, tensors=tensors)
        expected = []
        for b, begin, end in places:
            where = index(shape, b, torch.arange(begin, end))
            out[where] = math.nan
            small = self.small(host, make_call(variant, 1, end - begin, **changes), b, begin)
            for name, tensor in tensors.items():
                tensor[where] = small.tensors[name][0].to(tensor.dtype)
            expected.append((where, small.on_cpu()["out"][0].to(call.x.dtype)))

        try:
            host.control.take_launches()
            host.control.set_blocks([])
            host.launch(call, {"out": out})
            (launch,) = host.control.take_launches()
            host.control.set_blocks(self.blocks(launch, places))
            host.launch(call, {"out": out})
        finally:
            host.control.set_blocks(None)
        for where, truth in expected:
            assert_same_bits(out[where], truth, f"{call} {launch} {offsets}")

    @staticmethod
    def small(host: Host, call: Call, b: int, begin: int) -> Call:
        """A call with only these elements. If noise is drawn, it is in float32, the dtype in which noise is drawn."""
        n = call.x.shape[1]
        call = call.with_tensors(lambda name, x: values(1, n, seed=begin % 97 + len(name), dtype=x.dtype))
        if not call.drawn:
            return call
        z = host.control.normals(call.seed % 2**64, call.first_id + b, 0, call.draw, begin // 4, n // 4 + 2)
        tensors = {**call.tensors, "x_t": call.x.float(), "noise": torch.tensor(z)[begin % 4 :][:n].view(1, n)}
        return replace(call, tensors=tensors, drawn=False)

    @staticmethod
    def blocks(launch: tuple[Sequence[int], Sequence[int]], places: Sequence[tuple[int, int, int]]) -> list[int]:
        """The blocks that may have these elements: x counts elements, y and then z samples, each modulo the grid."""
        (gx, gy, gz), (bx, by, _) = launch
        numbers = set()
        for b, begin, end in places:
            row = b // by
            for items in ITEMS:
                for x in range(begin // (bx * items), (end - 1) // (bx * items) + 1):
                    numbers.add(x % gx + gx * (row % gy + gy * (row // gy % gz)))
        return sorted(numbers)
