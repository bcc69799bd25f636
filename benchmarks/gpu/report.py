"""The results to read, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COMMAND = "python -m benchmarks.gpu"
SPEED = """Microseconds: the median, and the quartiles. Cold and warm are the device's own time, from CUDA graphs of
many launches; cold, the L2 cache has lost a set of inputs when it comes again. A call is what the host waits, launch
included. Of copy: the time of a device-to-device copy of the bytes that must be moved, over the cold time.
"""


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


def cells(row: Mapping[str, Any]) -> list[str]:
    cold = row.get("cold")
    names = [row["operation"], "x".join(map(str, row["shape"])), row["dtype"], row["way"]]
    of_copy = [f"{row['moved_bytes'] / cold['us'] / 1e3:.0f}", f"{100 * cold['of_copy']:.1f} %"] if cold else ["", ""]
    return [*names, time(cold), *of_copy, time(row.get("warm")), time(row["call"])]


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
        head = ("operation", "shape", "dtype", "way", "cold µs", "GB/s", "of copy", "warm µs", "call µs")
        lines += ["## Speed", "", SPEED, *table(head, map(cells, speed), 4)]
    lines += [f"- not measured: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines).rstrip() + "\n"
