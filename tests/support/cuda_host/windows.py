"""Checks operators on tensors that are too large for memory, at a few ranges of elements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from support.cuda_host.calls import Call, Host, Variant, assert_same_bits, make_call, values
from support.cuda_host.guarded import Sparse
from torch import Tensor

ITEMS = (4, 8)  # the numbers of elements that a thread may process in a turn (loop iteration)


def index(shape: Sequence[int], b: int, elements: Tensor) -> tuple[Tensor, ...]:
    """The indices of elements of sample b, one tensor for each dimension.

    elements: the elements' positions within the sample, in C order.
    """
    where = []
    for size in reversed(shape[1:]):
        where.append(elements % size)
        elements = elements // size
    return torch.tensor(b), *reversed(where)


def around(samples: Iterable[int], numbers: Iterable[int], numel: int) -> list[tuple[int, int, int]]:
    """Ranges (sample, begin, end) of elements around the positions `numbers`, 600 on each side, that do not overlap.

    numel: the number of elements of a sample, beyond which no range goes.
    """
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
    """Memory for huge tensors, of which only the elements that `check` reads and writes take memory."""

    def __init__(self) -> None:
        self.memory = {name: Sparse(2**34 + 64) for name in ("x_t", "model_output", "noise", "out")}

    def check(
        self,
        host: Host,
        variant: Variant,
        shape: Sequence[int],
        strides: Mapping[str, Sequence[int]],
        offsets: Mapping[str, int],
        places: Sequence[tuple[int, int, int]],
    ) -> None:
        """Checks the elements from `begin` to end - 1 of sample b, for each (b, begin, end) of `places`.

        Runs only the blocks that may process these elements. Compares the elements with the results of the CPU kernels
        for small tensors of the same values.

        strides: the strides of a tensor by its name; tensors without an entry have those of "out".
        offsets: the element of the memory at which a tensor begins, by its name, 0 by default.
        """
        changes = {"t": None, "t_index": 1, "draw": 2**32 - 9, "first_id": 2**55}
        call = make_call(variant, 1, 1, **changes)
        like = {**call.tensors, "out": call.x}
        tensors = {
            name: self.memory[name].tensor(tensor.dtype, shape, strides.get(name, strides["out"]), offsets.get(name, 0))
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
        """A call with new values for small tensors, which stand for the elements from `begin` on of sample b.

        If the large call draws noise, the small call gets that noise as a tensor. The tensor is float32, like drawn
        noise, and therefore x_t is, too.
        """
        n = call.x.shape[1]
        call = call.with_tensors(lambda name, x: values(1, n, seed=begin % 97 + len(name), dtype=x.dtype))
        if not call.drawn:
            return call
        z = host.control.normals(call.seed % 2**64, call.first_id + b, 0, call.draw, begin // 4, n // 4 + 2)
        tensors = {**call.tensors, "x_t": call.x.float(), "noise": torch.tensor(z)[begin % 4 :][:n].view(1, n)}
        return replace(call, tensors=tensors, drawn=False)

    @staticmethod
    def blocks(launch: tuple[Sequence[int], Sequence[int]], places: Sequence[tuple[int, int, int]]) -> list[int]:
        """The numbers of the blocks that may process these elements.

        A block's x counts elements. Its y and z count samples, with y fastest. Each wraps around at the grid's size.
        """
        (gx, gy, gz), (bx, by, _) = launch
        numbers = set()
        for b, begin, end in places:
            row = b // by
            for items in ITEMS:
                for x in range(begin // (bx * items), (end - 1) // (bx * items) + 1):
                    numbers.add(x % gx + gx * (row % gy + gy * (row // gy % gz)))
        return sorted(numbers)
