"""The parts in the order of their value: each is a command with a time limit, and a function that reads its log.

A part leaves nothing but its log, so a part that crashed or ran out of time still has all that it had printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent

NO_GPU = "no_gpu"  # the key of the machine's only row where torch finds no GPU
PASS, FAIL, CUT_OFF, NOT_MEASURED = "pass", "FAIL", "cut off", "not measured"


class Result(NamedTuple):
    """`verdict` is PASS, FAIL, CUT_OFF or NOT_MEASURED; `rows` are what the part printed as JSON, a row a line."""

    verdict: str
    found: str
    rows: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Part:
    """`seconds` is its share of the time. Time that a part leaves goes to the next ones.

    `read` takes the log and the exit status, which is None if the part was cut off.
    """

    name: str
    seconds: float
    command: Sequence[str]
    read: Callable[[str, int | None], Result]
    environment: Mapping[str, str] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------- logs


def rows(log: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects. The last one may be torn."""
    found = []
    for line in log.splitlines():
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.startswith("{") else []
    return found


def last_lines(log: str, count: int = 3) -> str:
    return " / ".join(line.strip() for line in log.rstrip().splitlines()[-count:])


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


# ------------------------------------------------------------------------------------------------------- commands


def pytest(*arguments: str, dry: bool) -> tuple[str, ...]:
    options = ("-v", "--tb=short", "-rfEs", "-p", "no:cacheprovider", "--device", "cpu" if dry else "cuda")
    return (sys.executable, "-m", "pytest", *options, *arguments)


CARD = "tests/cuda/test_card{}.py"
# Words in the paths of test files: those with the first of these come first, those with a late one last.
FIRST = ("graphs", "layouts", "special_values", "losses", "sampling", "extended", "loop")
LATE = ("bad_", "arguments", "refus")
NOT_ON_A_CARD = ("cuda", "peers", "project", "support")  # folders
DEVICE = re.compile(r"def \w+\([^)]*\b(device|normal|run|make_step_table)\b")  # the fixtures that need a device


def suite() -> list[str]:
    """The other test files that have tests for a GPU, the most telling ones first and those of refusals last."""

    def rank(path: str) -> int:
        late = len(FIRST) + any(word in path for word in LATE)
        return late if late > len(FIRST) else next((i for i, word in enumerate(FIRST) if word in path), late)

    files = [path.relative_to(ROOT) for path in sorted(ROOT.glob("tests/*/test_*.py"))]
    files = [path for path in files if path.parts[1] not in NOT_ON_A_CARD]
    return sorted((str(path) for path in files if DEVICE.search((ROOT / path).read_text("utf-8"))), key=rank)


def compute_sanitizer() -> str | None:
    """On PATH, or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)])
    return shutil.which("compute-sanitizer", path=path)


def sanitizer(tool: str, seconds: float) -> Part:
    """Every kernel once, on small tensors, under a tool."""
    path = compute_sanitizer()
    # torch tries calls that may fail. initcheck must see torch's kernels too, since they write what ours read.
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "1000"]
    options += ["--kernel-name", f"kns={OURS}"] * (tool != "initcheck")
    tests = pytest(CARD.format("_bits"), "-k", "test_every_kernel and (4x3x32x32 or 3x5x7x9)", dry=False)
    # Each tensor has an allocation of its own, so that an access behind its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, seconds, (path, *options, *tests) if path else (), read_sanitizer, environment)


def all_parts(*, dry: bool) -> list[Part]:
    def script(name: str, seconds: float, *arguments: str) -> Part:
        command = (sys.executable, "-X", "faulthandler", "-m", f"{__package__}.{name}", *arguments, *["--dry"] * dry)
        return Part("-".join([name, *arguments]), seconds, command, read_rows)

    def tests(name: str, seconds: float, *files: str) -> Part:
        return Part(name, seconds, pytest(*files, dry=dry), read_pytest)

    return [
        # Importing torch alone may take nine seconds on a fresh machine; without a card nothing else is worth a start.
        script("machine", 90),
        *([] if dry else [script("build", 90)]),
        tests("bits", 40, CARD.format("_bits")),
        tests("costs", 25, CARD.format("_costs"), CARD.format("_graphs"), CARD.format("")),
        script("speed", 45, "steps"),
        script("speed", 30, "compiled"),
        script("speed", 20, "loop"),
        script("speed", 25, "rest"),
        tests("suite", 60, *suite()),
        *([] if dry else [sanitizer("memcheck", 25)]),
        *([] if dry else [sanitizer(tool, 10) for tool in ("racecheck", "initcheck", "synccheck")]),
    ]
