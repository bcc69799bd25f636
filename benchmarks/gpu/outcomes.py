"""A plugin of pytest that writes down each test's outcome as it comes, so that a run that is cut off has its counts."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["ENVIRONMENT", "read"]

ENVIRONMENT = "DDPM_EXT_GPU_OUTCOMES"


def _write(outcome: str, report: Any) -> None:
    if outcome == "skipped" and isinstance(report.longrepr, tuple):
        why = str(report.longrepr[2])
    else:
        why = str(report.longrepr or "")
    with open(os.environ[ENVIRONMENT], "a", encoding="utf-8") as lines:
        lines.write(json.dumps([outcome, report.nodeid, why[-800:]]) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome == "skipped":
        _write(report.outcome, report)
    elif report.outcome == "failed":
        _write("error", report)


def pytest_collectreport(report: Any) -> None:
    if report.outcome == "failed":
        _write("error", report)


def read(path: Path) -> tuple[Counter[str], list[tuple[str, str]], Counter[str]]:
    """Counts of outcomes; what failed, and how; why tests were skipped."""
    counts: Counter[str] = Counter()
    failed, skipped = [], Counter[str]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        outcome, test, why = json.loads(line)
        counts[outcome] += 1
        if outcome in ("failed", "error"):
            failed.append((test, why))
        elif outcome == "skipped":
            skipped[why] += 1
    return counts, failed, skipped
