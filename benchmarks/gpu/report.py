"""The results to read, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.logs import COUNTERS
from benchmarks.gpu.names import ADD, COMPILED, DIFFUSERS, NEAR, OURS

COMMAND = "python -m benchmarks.gpu"
SPEED = """Microseconds: the median, and the quartiles. Cold and warm are the device's own time, from CUDA graphs of
many launches; cold, the L2 cache has lost a set of inputs when it comes again. A call is what the host waits, launch
included. Of copy: the time of a device-to-device copy of the bytes that must be moved, as cold or as warm, over this
time. MHz: the multiprocessors' clock right behind the launches, by a kernel that waits for a number of cycles, and what
held it down; a row whose clock is lower than the others' cannot be compared with them.
"""


BOUNDS = """A step's time over that of an empty launch, and over that of a torch.add, whose one kernel reads and writes
three tensors as the step does; the time of a copy of the same bytes, and of others' steps, over the step's. A step is
as fast as its bytes if it takes as long as the copy, and else as a launch if it takes as long as torch.add, both within
15 %. What fits in the L2 cache is warm here, as a step is that follows a model, and all else cold. Beside diffusers'
step, which no graph can hold, both are calls.
"""
NEARLY = 1.15


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: int) -> list[str]:
    """The columns from `right` on are numbers."""
    rule = ["---" if i < right else "---:" for i in range(len(head))]
    cells = [head, rule, *([str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells] + [""]


def time(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    digits = 2 if found["us"] < 100 else 1
    return f"{found['us']:.{digits}f} ({found['us_low']:.{digits}f} to {found['us_high']:.{digits}f})"


KEYS = ("warm", "cold", "call")  # the first that a row has is its headline


def cells(row: Mapping[str, Any]) -> list[str]:
    names = [row["operation"], "x".join(map(str, row["shape"])), row["dtype"], row["way"]]
    cold, warm = row.get("cold", {}), row.get("warm", {})
    bandwidth = f"{row['moved_bytes'] / cold['us'] / 1e3:.0f}" if cold else ""
    copies = [f"{100 * found['of_copy']:.1f} %" if "of_copy" in found else "" for found in (cold, warm)]
    clock = warm or cold
    held = [f"{clock['mhz']}", *([clock["limits"]] if clock["limits"] != "none" else [])] if "mhz" in clock else []
    return [*names, time(cold), bandwidth, copies[0], time(warm), copies[1], time(row["call"]), ", ".join(held)]


def ratio(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> float:
    """A row's time over another's, both by the first of KEYS that both have."""
    if other is None:
        return math.nan
    key = next(key for key in KEYS if key in row and key in other)
    return row[key]["us"] / other[key]["us"]


def bounds(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Of each shape and dtype of a step: its time beside others', and what follows from that."""
    empty = next((row for row in rows if row["operation"] == "empty launch"), None)
    ways = {(row["way"], str(row["shape"]), row["dtype"]): row for row in rows if row["operation"] == "p_sample"}
    for (way, shape, dtype), row in ways.items():
        if way == OURS and "cold" in row:
            add, *peers = (ways.get((other, shape, dtype)) for other in (ADD, NEAR, COMPILED, DIFFUSERS))
            beside, copy = (ratio(row, empty), ratio(row, add)), row.get("warm", row["cold"])["of_copy"]
            found = [*beside, copy, *(1 / ratio(row, peer) for peer in peers)]
            fast = ["its bytes"] * (copy > 1 / NEARLY) or ["a launch"] * (beside[1] < NEARLY)
            yield [
                "x".join(map(str, row["shape"])),
                dtype,
                *(f"{number:.2f}" for number in found),
                *(fast or ["neither"]),
            ]


def markdown(parts: Mapping[str, Mapping[str, Any]]) -> str:
    about = (parts.get("machine", {}).get("rows") or [{}])[0]
    rows = [row for name, part in parts.items() if name.startswith("speed") for row in part["rows"]]
    speed = [row for row in rows if "error" not in row]
    speed.sort(key=lambda r: (r["operation"], r["dtype"], r.get("moved_bytes", 0), r["shape"], r["call"]["us"]))
    head = ("part", "verdict", "seconds", "found")
    lines = [f"# {about.get('card', 'Unknown card')}", "", f"By `{COMMAND}`:", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "card"]
    lines += ["", "## Parts", "", *table(head, ([name, *(p[key] for key in head[1:])] for name, p in parts.items()), 4)]
    if speed:
        head = ("operation", "shape", "dtype", "way", "cold µs", "GB/s", "of copy", "warm µs", "of copy", "call µs")
        head += ("MHz",)
        lines += ["## Speed", "", SPEED, *table(head, map(cells, speed), 4)]
        head = ("shape", "dtype", "of empty", "of add", "copy", "eager", "compiled", "diffusers", "as fast as")
        lines += ["## A step", "", BOUNDS, *table(head, bounds(speed), 2)]
    if counted := parts.get("counters", {}).get("rows"):
        names = ("operation", "dtype", *COUNTERS)
        lines += ["## Counters", "", *table(names, ([row[name] for name in names] for row in counted), 2)]
    lines += [f"- not measured: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines).rstrip() + "\n"
