"""What a run leaves: everything as JSON, and tables to read as Markdown."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.claims import judge
from benchmarks.gpu.context import replace_text

__all__ = ["markdown", "slug", "write"]

COMMAND = "python -m benchmarks.gpu"


def slug(card: str) -> str:
    """`nvidia-h100-80gb-hbm3`, for example."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: int) -> list[str]:
    """The columns from `right` on are numbers."""
    rule = ["---" if i < right else "---:" for i in range(len(head))]
    cells = [head, rule, *([str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells] + [""]


def shape(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def time(row: Mapping[str, Any]) -> list[str]:
    """The median, and the quartiles."""
    digits = 2 if row["us"] < 100 else 1
    return [f"{row['us']:.{digits}f}", f"{row['us_low']:.{digits}f} to {row['us_high']:.{digits}f}"]


def machine(found: Mapping[str, Any]) -> list[str]:
    clocks = found.get("clocks", {})
    commit = f"commit {found['commit'] or 'unknown'}{' with changes' * found['changed_since_commit']}"
    gib = f"{found['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in found else ""
    lines = [
        ", ".join(filter(None, [found["card"], gib, f"driver {clocks['driver_version']}" if clocks else ""])),
        f"torch {found['torch']} with CUDA {found['torch_cuda']}, nvcc {found['nvcc']}, Python {found['python']}",
        f"{found['cpu']}, {found['cores']} cores",
        f"{found['date']}, {commit}, csrc {found['csrc']}",
    ]
    if clocks:
        lines.append(", ".join(f"{name} {value}" for name, value in clocks.items() if name != "driver_version"))
    return [f"- {line}" for line in lines] + [f"- `{COMMAND}`", ""]


def kernels(results: Mapping[str, Any]) -> list[str]:
    rows = sorted(results.get("kernels", []), key=lambda r: (r["operation"], r["dtype"], r["moved_bytes"]))
    if not rows:
        return []
    empty = results["empty"]
    lines = [
        "## Kernels",
        "",
        "From CUDA graphs of many launches. Cold: the L2 cache has forgotten a set of inputs when it comes again. "
        "Of copy: the time of a device-to-device copy that moves as many bytes, over ours. "
        f"An empty launch ({empty['what']}): {empty['us']:.2f} µs.",
        "",
    ]
    head = ["operation", "shape", "dtype", "L2", "median µs", "quartiles µs", "GB/s", "of copy", "empty launches"]
    return lines + table(
        head,
        (
            [
                *(r["operation"], shape(r), r["dtype"], r["cache"]),
                *(*time(r), f"{r['moved_bytes'] / r['us'] / 1e3:.0f}", f"{100 * r['of_copy']:.1f} %"),
                f"{r['of_empty']:.2f}",
            ]
            for r in rows
        ),
        4,
    )


def calls(results: Mapping[str, Any]) -> list[str]:
    """By operation and shape, eager over each."""
    groups = defaultdict(list)
    for row in results.get("calls", []):
        groups[row["operation"], tuple(row["shape"])].append(row)
    rows = []
    for (operation, _), members in sorted(groups.items()):
        eager = next((r["us"] for r in members if r["way"] in ("eager", "torch.randn")), None)
        for r in sorted(members, key=lambda r: r["us"]):
            rows.append([operation, shape(r), r["way"], *time(r), f"{eager / r['us']:.1f}" if eager else ""])
    if not rows:
        return []
    text = (
        "What a caller waits a call, launch included, of many in a row; float32. Ratio: eager's time over this one's."
    )
    head = ["operation", "shape", "way", "median µs", "quartiles µs", "ratio"]
    return ["## Calls", "", text, "", *table(head, rows, 3), *(f"- {line}" for line in results["skipped"]), ""]


def checks(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each check that does not hold, the others counted."""
    rows = []
    for name, part in parts.items():
        found = part["results"].get("checks", [])
        if found:
            rows.append([name, f"{sum(c['ok'] is True for c in found)} of {len(found)} hold", ""])
        rows += [[name, c["name"], c["found"]] for c in found if c["ok"] is not True or len(found) <= 8]
    return ["## Checks", "", *table(["part", "check", "found"], rows, 3)] if rows else []


def tests(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, run in results.items():
        if not isinstance(run, dict):
            continue
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(run["counts"].items()))
        lines.append(f"- `{name}`: {counts or 'none'} in {run['seconds']} s")
        lines += [f"  - failed: {test}" for test, _ in run["failed"]]
        lines += [f"  - {count} skipped: {why}" for why, count in run["skipped"].items()]
    return ["## Tests", "", *lines, ""] if lines else []


def markdown(content: Mapping[str, Any]) -> str:
    parts = content["parts"]
    found = parts["machine"]["results"]
    speed = parts.get("speed", {}).get("results", {})
    lines = [f"# {found['card']}", "", *machine(found), "## Verdicts", ""]
    columns = ("claim", "verdict", "found")
    lines += table(columns, ([v[column] for column in columns] for v in content["verdicts"]), 3)
    lines += kernels(speed) + calls(speed) + checks(parts) + tests(parts.get("suite", {}).get("results", {}))
    lines += ["## Parts", ""]
    rows = ([name, p["status"], p["seconds"], p["error"][-1] if p["error"] else ""] for name, p in parts.items())
    lines += table(["part", "status", "seconds", "last line"], rows, 3)
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path, parts: Mapping[str, Any], *, dry: bool) -> None:
    """Both files. What was measured is on the disk before anything is made of it."""
    content: dict[str, Any] = {"command": COMMAND, "dry": dry, "verdicts": [], "parts": parts}
    name = "dry" if dry else slug(parts["machine"]["results"]["card"])
    replace_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    content["verdicts"] = [v._asdict() for v in judge(parts, dry=dry)]
    replace_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    replace_text(folder / f"{name}.md", markdown(content))
