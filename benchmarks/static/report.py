"""The findings as Markdown: every sentence with a number in it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

from benchmarks.static.cards import ASSUMED, CARDS, PIPES, PUBLISHED, RATES, Card
from benchmarks.static.compiler import Build, Resources
from benchmarks.static.kernels import BOUND, LOSS, STEP, Variant, demangle, share_that_adds_up, variant
from benchmarks.static.path import Path, hot_path, team_path
from benchmarks.static.pipes import CLASSES, WIDE, classify
from benchmarks.static.roofline import Roofline, roofline
from benchmarks.static.sass import Kernel

VECTOR = "vector"


class Finding:
    """One kernel on one architecture. `turns`: vectors that a thread takes, in a kernel that loops over them."""

    def __init__(self, arch: str, kernel: Kernel, resources: Resources, variant: Variant):
        self.arch, self.kernel, self.resources, self.variant = arch, kernel, resources, variant

    @cached_property
    def path(self) -> Path:
        if self.variant.adds_up:
            return team_path(self.kernel, share_that_adds_up())
        return hot_path(self.kernel, self.variant.has_options)

    @property
    def items(self) -> int:
        """Elements of a vector: what a turn stores, by their size; of the step with options, which may store a result
        in several dtypes or twice, what it loads."""
        if self.variant.op == STEP:
            loaded = sum(i.global_bits for i in self.path.turn if i.name == "LDG")
            return loaded // (8 * self.variant.bytes_read)
        stored = sum(i.global_bits for i in self.path.turn if i.name == "STG")
        return stored // (8 * self.variant.bytes_written)

    def elements(self, turns: int) -> int:
        """Of one thread."""
        return self.items * (turns if self.path.loops else 1)

    def classes(self, turns: int) -> dict[str, float]:
        """Instructions an element."""
        counts = dict.fromkeys(CLASSES, 0.0)
        for instruction, times in self.path.issued(turns).items():
            counts[classify(instruction)] += times
        return {name: count / self.elements(turns) for name, count in counts.items()}

    def widths(self, name: str) -> Counter[int]:
        """Of a turn's loads (LDG) or stores (STG), in bits."""
        return Counter(i.global_bits for i in self.path.turn if i.name == name)

    def roofline(self, card: Card, turns: int, wide: int = WIDE) -> Roofline:
        return roofline(card, self.path.issued(turns), self.elements(turns), self.variant.bytes_an_element, wide)


# Passes over a sample whose number depends on its values and blocks: a count by element says nothing about them.
STATISTICS = ("threshold_samples<", "search_samples(", "spread_of_samples<")


def findings(builds: Iterable[Build]) -> list[Finding]:
    """Of all kernels but those of a sample's statistics, in an order for reading."""
    found = []
    for build in builds:
        names = demangle(kernel.name for kernel in build.kernels)
        for kernel, name in zip(build.kernels, names, strict=True):
            if any(statistic in name for statistic in STATISTICS):
                continue
            found.append(Finding(build.arch, kernel, build.resources[kernel.name], variant(name)))
    return sorted(found, key=lambda f: (CARD_ORDER[f.arch], order(f.variant)))


CARD_ORDER = {card.arch: number for number, card in enumerate(CARDS)}


def order(v: Variant):
    noises, ops = ["drawn", "none", "given"], ["ReverseStep", STEP, "Affine", "Randn", LOSS, BOUND]
    rank = ops.index(v.op) if v.op in ops else len(ops)
    return (v.access != VECTOR, v.device_seed, rank, noises.index(v.noise), v.dtypes != "float32", v.dtypes)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns are text in the first two places and numbers after."""
    rule = ["---" if place < 2 else "---:" for place in range(len(heads))]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def bits(widths: Counter[int]) -> str:
    return " ".join(f"{count}×{width}" for width, count in sorted(widths.items(), reverse=True)) or "none"


def shares(found: Sequence[Finding], cards: Sequence[Card], turns: int, wide: int = WIDE) -> str:
    """How many kernels, counted once a card, are bound by what."""
    bound = Counter(f.roofline(card, turns, wide).bound for f in found for card in cards if card.arch == f.arch)
    return ", ".join(f"{count} of {bound.total()} by {name}" for name, count in bound.most_common())


def floors(found: Sequence[Finding], cards: Sequence[Card], turns: int) -> list[str]:
    rows: dict[tuple[str, str], list[str]] = {}
    for finding in found:
        v = finding.variant
        row = rows.setdefault((v.title, v.dtypes), [v.title, v.dtypes, str(v.bytes_an_element)])
        for card in cards:
            if card.arch == finding.arch:
                line = finding.roofline(card, turns)
                cell = f"{line.memory:.2f}, {line.busiest} {line.compute:.2f}, {line.ratio:.2f}"
                row.append(cell if line.bound == "memory" else f"**{cell}**")
    return [
        f"{turns} {'turn' if turns == 1 else 'turns'} a thread. Bound: {shares(found, cards, turns)}. Were IMAD.WIDE "
        f"as fast as IMAD: {shares(found, cards, turns, wide=1)}.",
        "",
        *table(["kernel", "dtypes", "B/element", *(card.name for card in cards)], rows.values()),
    ]


def pipes_table(found: Sequence[Finding], card: Card, turns: int) -> list[str]:
    pipes = list(RATES[card.arch])
    rows = []
    for finding in found:
        line = finding.roofline(card, turns)
        times = [f"{line.pipes[pipe]:.2f}" for pipe in pipes]
        rows.append(
            [
                finding.variant.title,
                finding.variant.dtypes,
                f"{line.memory:.2f}",
                *times,
                line.bound,
                f"{line.ratio:.2f}",
            ]
        )
    return table(["kernel", "dtypes", "memory", *pipes, "bound by", "pipe/memory"], rows)


def classes_table(found: Sequence[Finding], turns: int) -> list[str]:
    rows = []
    for finding in found:
        counts = finding.classes(turns)
        rows.append(
            [
                finding.variant.title,
                finding.variant.dtypes,
                str(finding.resources.registers),
                str(finding.items),
                str(len(finding.path.once)),
                str(len(finding.path.turn)),
                f"{sum(counts.values()):.1f}",
                *(f"{counts[name]:.1f}" for name in CLASSES),
                bits(finding.widths("LDG")),
                bits(finding.widths("STG")),
            ]
        )
    heads = ["kernel", "dtypes", "registers", "items", "once", "a turn", "an element", *CLASSES, "loads", "stores"]
    return table(heads, rows)


def resources_table(found: Sequence[Finding], archs: Sequence[str]) -> list[str]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for finding in found:
        v = finding.variant
        title = v.title if v.access == VECTOR else f"{v.title}, {v.access}"
        rows.setdefault((title, v.dtypes), [title, v.dtypes]).append(str(finding.resources.registers))
    return table(["kernel", "dtypes", *(f"sm_{arch}" for arch in archs)], rows.values())


def waste(found: Sequence[Finding]) -> list[str]:
    """What no kernel should need, and which do."""
    lines = []
    counts = {
        "spills": lambda f: f.resources.spill_stores + f.resources.spill_loads,
        "a stack frame": lambda f: f.resources.stack,
        "local memory": lambda f: f.resources.local + sum(i.name in ("LDL", "STL") for i in f.kernel.instructions),
        "shared memory, but for sums": lambda f: 0 if f.variant.adds_up else f.resources.shared,
        "calls": lambda f: sum(i.calls for i in f.kernel.instructions),
    }
    for name, count in counts.items():
        guilty = [f for f in found if count(f)]
        share = f"{len(guilty)} of {len(found)}" if guilty else f"none of {len(found)}"
        lines.append(f"- {name}: {share} kernels" + (f", at most {max(map(count, guilty))}" if guilty else ""))
    return lines


def rates(archs: Sequence[str]) -> list[str]:
    rows = [[pipe, what, *(str(RATES[arch].get(pipe, "-")) for arch in archs)] for pipe, what in PIPES.items()]
    return table(["pipe", "what it is, and its threads a clock an SM", *(f"sm_{arch}" for arch in archs)], rows)


METHOD = """Each source is compiled to a cubin with the flags of setup.py and disassembled. For every kernel with
128-bit access the way of one thread is found by control flow alone: from entry to exit through the 128-bit stores,
the noise drawn, every term of the arithmetic present, without calls and without the ragged end. What only an option
needs counts where it stands under a predicate, not where a branch leads past it; of step_with_options, whose options
are known when it runs, the way is that with all that a kernel may have, which nothing asks for at once. Of Loss it is
that with x_start, slope and squared error, and with the bound not that of t = 0; some of a block's warps add up what
all have, and count as the share that they are; the last block of a sample, which adds up the others' sums, is left
out. The innermost loop around the stores, if there is one, is a turn; the rest is issued once. Both count, over the
elements that the thread stores. The kernels of x_start_scale and output_scale are left out: how often they pass over
a sample depends on its values.

A pipe's time is the instructions that it takes over its rate; issue stands for all of them over the schedulers' rate.
Bytes are those of the tensors: table rows and timesteps come from caches. Latency, the clock that the power allows, and
the share of the published bandwidth that a copy reaches are left out: these are floors, not predictions."""


FLOORS = """Picoseconds an element that memory needs, those of the busiest pipe, and the second over the first: below 1
the bytes set the time, from 1 on (bold) the pipe does. For tensors too large for the caches."""


def render(builds: Sequence[Build], heading: Sequence[str], turns: Sequence[int]) -> str:
    """`turns`: the floors are computed for each number, the details for the first."""
    found = findings(builds)
    cards = [card for card in CARDS if any(f.arch == card.arch for f in found)]
    vector = [f for f in found if f.variant.access == VECTOR]
    main = [f for f in vector if not f.variant.device_seed]
    loops = sum(f.path.loops for f in main)
    lines = ["# The kernels as machine code", "", *(f"- {line}" for line in heading), "", "## Floors", "", FLOORS, ""]
    lines += [f"{loops} of {len(main)} kernels loop over vectors, one a turn."]
    for number in turns:
        lines += ["", *floors(main, cards, number)]
    lines += ["", "## Waste", "", *waste(found)]
    for card in cards:
        lines += [
            *("", f"## {card.name}, sm_{card.arch}", ""),
            f"{card.sms} SMs at {card.clock} GHz, {card.bandwidth} GB/s ({card.source}).",
            *("", f"Picoseconds an element, turns a thread: {turns[0]}.", ""),
            *pipes_table([f for f in main if f.arch == card.arch], card, turns[0]),
            *(
                "",
                "Registers, elements a turn, instructions a thread (once, a turn) and an element (all, by class), and",
            ),
            *("global loads and stores of a turn in bits:", ""),
            *classes_table([f for f in vector if f.arch == card.arch], turns[0]),
        ]
    archs = [card.arch for card in cards]
    lines += ["", "## Registers of all kernels", "", *resources_table(found, archs)]
    lines += [
        "",
        "## Method",
        "",
        METHOD,
        "",
        *rates(archs),
        "",
        "Published:",
        "",
        *(f"- {line}" for line in PUBLISHED),
    ]
    lines += ["", "Assumed, the slower where in doubt:", "", *(f"- {line}" for line in ASSUMED)]
    return "\n".join(lines) + "\n"
