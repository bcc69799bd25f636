"""The way that a thread takes through a kernel when it has full vectors to do: found by control flow alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.static.pipes import FLOAT, FLOAT2
from benchmarks.static.sass import Instruction, Kernel

Score = tuple[int, ...]
Steps = tuple[int, "Steps"] | None  # an instruction, and those after it
Way = tuple[Score, Steps]
NO_STEPS: Way = ((0,) * 8, None)


def walk(kernel: Kernel) -> tuple[list[int], dict[int, list[int]], dict[int, list[int]]]:
    """What is reached from the first instruction, every one before those it leads to; the edges that lead forward, and
    those that close a loop."""
    order: list[int] = []
    forward: dict[int, list[int]] = {0: []}
    back: dict[int, list[int]] = {}
    active = {0}
    stack = [(0, iter(kernel.successors(0)))]
    while stack:
        node, successors = stack[-1]
        for successor in successors:
            if successor in active:
                back.setdefault(node, []).append(successor)
                continue
            forward[node].append(successor)
            if successor not in forward:
                forward[successor] = []
                active.add(successor)
                stack.append((successor, iter(kernel.successors(successor))))
                break
        else:
            stack.pop()
            active.discard(node)
            order.append(node)
    return order[::-1], forward, back


def shortest_exit(kernel: Kernel, start: int) -> list[int]:
    """The shortest way from an instruction to an EXIT, both included; empty where there is none."""
    came_from: dict[int, int | None] = {start: None}
    queue = [start]
    for node in queue:
        if kernel.instructions[node].name == "EXIT":
            way: list[int] = []
            step: int | None = node
            while step is not None:
                way.append(step)
                step = came_from[step]
            return way[::-1]
        for successor in kernel.successors(node):
            if successor not in came_from:
                came_from[successor] = node
                queue.append(successor)
    return []


def natural_loops(forward: Mapping[int, list[int]], back: Mapping[int, list[int]]) -> list[set[int]]:
    """For every edge that closes a loop: the loop's head, and all that reaches the edge without passing the head."""
    before: dict[int, list[int]] = {}
    for edges in (forward, back):
        for node, successors in edges.items():
            for successor in successors:
                before.setdefault(successor, []).append(node)
    loops = []
    for end, heads in back.items():
        for head in heads:
            loop, queue = {head, end}, [end]
            while queue:
                node = queue.pop()
                new = [n for n in before.get(node, []) if n not in loop] if node != head else []
                loop.update(new)
                queue += new
            loops.append(loop)
    return loops


def way_round(forward: Mapping[int, list[int]], node: int, loop: set[int]) -> list[int]:
    """What stands in a loop between the instruction that may leave it and the edge that closes it."""
    way = []
    while inside := [successor for successor in forward[node] if successor in loop]:
        node = min(inside)
        way.append(node)
    return way


class Path(NamedTuple):
    """What a thread issues once, and what it issues for every vector that it takes: all it does where it takes one.
    `first`: that of the warps that add up for their block, which are a `share` of the threads."""

    once: list[Instruction]
    turn: list[Instruction]
    loops: bool
    first: Path | None = None
    share: float = 0.0

    def issued(self, turns: int) -> dict[Instruction, float]:
        """Instructions of a thread that takes that many vectors, and how often each comes, in the mean over a block."""
        counts: dict[Instruction, float] = {}

        def add(path: Path, share: float) -> None:
            for instructions, times in ((path.once, 1), (path.turn, turns if path.loops else 1)):
                for instruction in instructions:
                    counts[instruction] = counts.get(instruction, 0) + share * times

        if self.first is None:
            add(self, 1)
        else:
            add(self, 1 - self.share)
            add(self.first, self.share)
        return counts


def hot_path(kernel: Kernel, has_options: bool = False, sums: int = 0) -> Path:
    """Of a kernel with 128-bit stores, or 64-bit ones where it has no wider, for full vectors.

    Of all ways from entry to exit that make 128-bit stores and go round no loop twice, the one with the fewest calls,
    the fewest such stores (ptxas may unroll a loop over vectors), the fewest narrower ones (the ragged end), the most
    wide loads behind them (a turn may end with those of the next one), then the most reciprocal square roots (two
    normals need one) and the most float32 arithmetic (the noise is added, every term present), and then the shortest:
    what only an option needs is left out where it stands behind a branch, and counted where it stands under a
    predicate. The innermost loop around all of the 128-bit stores is the turn.

    Of a kernel that `has_options` it is the way with all of them: of the ways without a ragged end, which loads and
    stores less than 64 bits at a time, the one with the most 128-bit stores, then the most loads before them, and of
    what excludes one another the most float32 arithmetic; after them, the shortest.

    Of a kernel whose blocks add up, `sums` is 1 for the way of the warp that does it, with the most shuffles and
    atomics, and -1 for that of the others, with none; there a vector is stored by 64 bits at least, and of what
    excludes one another the shortest is taken that draws the noise.
    """
    order, forward, back = walk(kernel)
    loops = natural_loops(forward, back)
    loop_of = dict(zip(((end, head) for end, heads in back.items() for head in heads), loops, strict=True))
    instructions = kernel.instructions
    widest = max((i.global_bits for i in instructions if i.name == "STG"), default=0)
    wide = 64 if sums or widest == 64 else 128

    def worth(i: int, stores: bool) -> Score:
        """`stores`: whether the way makes a 128-bit store from here on."""
        one = instructions[i]
        stored = one.global_bits if one.name == "STG" else 0
        # the sums that a last block adds up are volatile, and so strong
        next_loads = int(one.name == "LDG" and one.global_bits >= 64 and not stores and "STRONG" not in one.opcode)
        summed = sums * int(one.name in ("SHFL", "ATOMG"))
        if has_options:
            last = one.opcode.startswith("MUFU.RSQ") if sums else one.name in FLOAT | FLOAT2
            gains = (stored, int(one.name == "LDG"), int(last)) if stores else (0, 0, 0)
            return (-int(one.calls), summed, -int(0 < one.global_bits < 64), next_loads * abs(sums), *gains, -1)
        return (
            -int(one.calls),
            summed,
            -stored if stored >= 128 else 0,
            -stored if stored < 128 else 0,
            next_loads,
            int(one.opcode.startswith("MUFU.RSQ")),
            int(one.name in FLOAT | FLOAT2),
            -1,
        )

    def is_wide(i: int) -> bool:
        return instructions[i].name == "STG" and instructions[i].global_bits >= wide

    def longer(node: int, way: Way, stores: bool = False) -> Way:
        score, steps = way
        return tuple(x + y for x, y in zip(worth(node, stores), score, strict=True)), (node, steps)

    # The best way from every instruction on: without a 128-bit store, and with.
    without: dict[int, Way] = {}
    storing: dict[int, Way] = {}
    for node in reversed(order):
        plain = [without[s] for s in forward[node] if s in without]
        if instructions[node].name == "EXIT":
            plain.append(NO_STEPS)
        for head in back.get(node, []):
            out = shortest_exit(kernel, head)
            # else it goes round the loop once more, and there is a shorter way out from here
            if out and not any(instructions[i].bits for i in out if i in loop_of[node, head]):
                plain.append(functools.reduce(lambda way, i: longer(i, way), reversed(out), NO_STEPS))
        store = [storing[s] for s in forward[node] if s in storing]
        if is_wide(node):
            plain, store = [], plain + store
        for ways, best in ((plain, without), (store, storing)):
            if ways:
                best[node] = longer(node, max(ways, key=lambda way: way[0]), best is storing)
    if 0 not in storing:
        raise ValueError(f"{kernel.name}: no way from its entry to an EXIT makes a {wide}-bit store")
    path: list[int] = []
    steps = storing[0][1]
    while steps is not None:
        node, steps = steps
        path.append(node)
    stores = set(filter(is_wide, path))
    around = [loop for loop in loops if stores <= loop]
    if not around:
        return Path([], [instructions[node] for node in path], False)
    inner = min(around, key=len)
    # A way that leaves through the loop's head comes to it twice; the second time is not of the turn.
    inside = list(dict.fromkeys(node for node in path if node in inner))
    outside = list((Counter(path) - Counter(inside)).elements())
    inside += way_round(forward, inside[-1], inner)
    return Path([instructions[node] for node in outside], [instructions[node] for node in inside], True)


def team_path(kernel: Kernel, share: float) -> Path:
    """Of a kernel whose blocks add up what their threads have: the way of the warps that don't, and in it that of the
    share that does."""
    others, first = (hot_path(kernel, has_options=True, sums=sums) for sums in (-1, 1))
    return others._replace(first=first, share=share)
