"""What README and DESIGN claim of the GPU, and what a run says of each: pass, FAIL or not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Verdict", "failed", "judge"]

Parts = Mapping[str, Mapping[str, Any]]

OF_COPY = 0.9  # of the bandwidth of a copy, at the least, where a step moves more than LARGE times the L2 cache
LARGE = 2
OF_EMPTY = 1.5  # times an empty launch, at the most, for the smallest shape
SMALL = [1, 3, 32, 32]


class Verdict(NamedTuple):
    claim: str
    correctness: bool  # else speed, which fails no run
    verdict: str
    found: str


def trouble(part: Mapping[str, Any] | None) -> str:
    """Why a part has not found all that it should have; empty where it has."""
    if part is None:
        return "not run"
    if part["status"] == "done":
        return ""
    return f"{part['status']}: {part['error'][-1]}" if part["error"] else part["status"]


def from_checks(parts: Parts, name: str, prefix: str) -> tuple[str, str]:
    part = parts.get(name)
    checks = [c for c in (part or {}).get("results", {}).get("checks", []) if c["name"].startswith(prefix)]
    wrong = [c for c in checks if c["ok"] is False]
    untold = [c for c in checks if c["ok"] is None]
    good = len(checks) - len(wrong) - len(untold)
    counts = f"{good} of {len(checks)}" if len(checks) != 1 else ""
    if wrong:
        return "FAIL", f"{counts}; {wrong[0]['name']}: {wrong[0]['found']}".removeprefix("; ")
    why = trouble(part)
    if why:
        # what breaks off while it checks is wrong, but for what had no time
        broken = part is not None and part["status"] == "failed"
        return ("FAIL" if broken else "not measured"), "; ".join(filter(None, [counts, why]))
    if not good:
        return "not measured", untold[0]["found"] if untold else "no such check"
    if len(checks) == 1:
        return "pass", checks[0]["found"]
    return "pass", counts + "".join(f"; {c['name']} not measured: {c['found']}" for c in untold)


def built(parts: Parts) -> tuple[str, str]:
    part = parts.get("build")
    if part is None or part["status"] in ("skipped", "cut off"):
        return "not measured", trouble(part)
    if part["status"] == "failed":
        return "FAIL", trouble(part)
    results = part["results"]
    if "seconds" not in results:
        return "not measured", "nothing is built in a dry run"
    return "pass", f"for {results['environment']['TORCH_CUDA_ARCH_LIST']} in {results['seconds']} s"


def of_copy(parts: Parts) -> tuple[str, str]:
    results = parts.get("speed", {}).get("results", {})
    rows = [r for r in results.get("kernels", []) if r["operation"] == "p_sample" and r["cache"] == "cold"]
    rows = [row for row in rows if row["moved_bytes"] > LARGE * results["l2_bytes"]]
    if not rows:
        return "not measured", trouble(parts.get("speed")) or "no large shape"
    found = ", ".join(f"{100 * r['of_copy']:.1f} % {r['dtype']} {'x'.join(map(str, r['shape']))}" for r in rows)
    return ("pass" if min(row["of_copy"] for row in rows) >= OF_COPY else "FAIL"), found


def of_empty(parts: Parts) -> tuple[str, str]:
    results = parts.get("speed", {}).get("results", {})
    rows = [r for r in results.get("kernels", []) if r["operation"] == "p_sample" and r["shape"] == SMALL]
    rows = [row for row in rows if row["dtype"] == "float32"]
    if not rows:
        return "not measured", trouble(parts.get("speed")) or "no small shape"
    found = ", ".join(f"{row['cache']} {row['us']:.2f} µs, {row['of_empty']:.2f} times" for row in rows)
    found = f"{found} an empty launch's {results['empty']['us']:.2f} µs ({results['empty']['what']})"
    return ("pass" if max(row["of_empty"] for row in rows) <= OF_EMPTY else "FAIL"), found


def checked(part: str, prefix: str = "") -> Callable[[Parts], tuple[str, str]]:
    return lambda parts: from_checks(parts, part, prefix)


CLAIMS: Sequence[tuple[str, bool, Callable[[Parts], tuple[str, str]]]] = (
    ("it builds for this card and loads", True, built),
    ("the CPU's bits, noise included", True, checked("bits")),
    ("a step is one launch", True, checked("costs", "launches")),
    ("a step synchronises nothing", True, checked("costs", "synchronisation")),
    ("a step allocates its output alone", True, checked("costs", "allocations:")),
    ("a step allocates nothing with out=", True, checked("costs", "allocations with out=")),
    ("a graph replayed with another seed: the eager bits", True, checked("graphs")),
    (f"large steps: >= {OF_COPY:.0%} of a copy's bandwidth", False, of_copy),
    (f"small steps: an empty launch (<= {OF_EMPTY} times)", False, of_empty),
    ("the tests pass on the card", True, checked("suite")),
    ("compute-sanitizer finds nothing", True, checked("sanitizer")),
)


def judge(parts: Parts, *, dry: bool) -> list[Verdict]:
    """In a dry run what passes is not measured; what fails on the CPU fails."""
    verdicts = []
    for claim, correctness, ask in CLAIMS:
        verdict, found = ask(parts)
        if dry and (verdict != "FAIL" or not correctness):
            verdict, found = "not measured", f"no card (on the CPU: {found})"
        verdicts.append(Verdict(claim, correctness, verdict, found))
    return verdicts


def failed(verdicts: Sequence[Verdict]) -> bool:
    return any(v.correctness and v.verdict == "FAIL" for v in verdicts)
