"""What the parts' logs say. A part leaves nothing else, so one that was cut off has all that it had printed."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

NO_GPU = "no_gpu"  # the key of the machine's only row where torch finds no GPU
PASS, FAIL, CUT_OFF, NOT_MEASURED = "pass", "FAIL", "cut off", "not measured"


class Result(NamedTuple):
    """`verdict` is PASS, FAIL, CUT_OFF or NOT_MEASURED; `rows` are what the part printed as JSON, a row a line."""

    verdict: str
    found: str
    rows: Sequence[dict[str, Any]] = ()


def rows(log: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects. The last one may be torn."""
    found = []
    for line in log.splitlines():
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.startswith("{") else []
    return found


def last_lines(log: str) -> str:
    return " / ".join(line.strip() for line in log.rstrip().splitlines()[-3:])


def read_rows(log: str, status: int | None) -> Result:
    """Of a part that prints rows."""
    found = rows(log)
    if status is None:
        return Result(CUT_OFF, f"{len(found)} rows", found)
    if status != 0:
        return Result(FAIL, f"exit status {status} after {len(found)} rows: {last_lines(log)}", found)
    return Result(PASS if found else NOT_MEASURED, f"{len(found)} rows", found)


def outcomes(log: str) -> tuple[Counter[str], list[str]]:
    """Counts of `pytest -v`, and the tests that failed."""
    lines = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", log, re.MULTILINE)
    return Counter(outcome.lower() for _, outcome in lines), [n for n, o in lines if o in ("FAILED", "ERROR")]


def read_pytest(log: str, status: int | None) -> Result:
    counts, failed = outcomes(log)
    found = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no tests"
    if failed:
        return Result(FAIL, f"{found}; first: {failed[0]}")
    if status is None:
        return Result(CUT_OFF, found)
    if status != 0:  # a crash of the process, among others
        return Result(FAIL, f"exit status {status}, {found}: {last_lines(log)}")
    return Result(PASS if counts["passed"] else NOT_MEASURED, found)


OURS = "ddpm_ext"  # is in the names of the kernels
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def read_sanitizer(log: str, status: int | None) -> Result:
    """compute-sanitizer marks its lines with "=". What it finds in torch's own kernels is no failure."""
    counts, failed = outcomes(log)
    lines = [line.lstrip("= ") for line in log.splitlines() if line.startswith("=====")]
    ours = [f"{before} {line}" for before, line in zip(["", *lines], lines, strict=False) if OURS in line]
    summary = SUMMARY.search(log)
    errors = int(summary[1] or summary[2]) if summary else len(ours)
    found = f"{errors} errors in {counts['passed']} tests"
    if failed or (ours and errors):
        return Result(FAIL, f"{found}; first: {[*ours, *failed][0]}")
    if status is None:
        return Result(CUT_OFF, found)
    if status != 0 or errors or not summary or not counts["passed"]:
        return Result(NOT_MEASURED, f"exit status {status}, {found}, none in a kernel of {OURS}: {last_lines(log)}")
    return Result(PASS, found)


# What Nsight Compute measures of each kernel, by the names in the results.
COUNTERS = {
    "ns": "gpu__time_duration.sum",
    "sectors a load": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "sectors a store": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "% of DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "% issue active": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}


def read_counters(log: str, status: int | None) -> Result:
    """Of Nsight Compute, which prints a table of the kernels at its end, below the rows of the calls in that order."""
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels = [line for line in csv.DictReader(lines[start:]) if (line["ID"] or "").isdigit()]
    found = [
        call | {name: kernel.get(metric) for name, metric in COUNTERS.items()}
        for call, kernel in zip(rows(log), kernels, strict=False)
    ]
    if status is None:
        return Result(CUT_OFF, f"{len(found)} kernels", found)
    if not found:
        return Result(NOT_MEASURED, f"exit status {status}: {last_lines(log)}")
    return Result(PASS, f"{len(found)} kernels", found)
