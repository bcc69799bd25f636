"""The parts in the order of their value: each is a command with a time limit, and a function that reads its log."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.logs import COUNTERS, OURS, Result, read_counters, read_pytest, read_rows, read_sanitizer

BUILD_CPU_SECONDS = 405  # of one architecture with the C++ sources, on a Xeon of 2023
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Part:
    """`seconds` is its share of the time. Time that a part leaves goes to the next ones. One that is `apart` has its
    seconds beside that time, so that a slow machine takes none from the measurements.

    `read` takes the log and the exit status, which is None if the part was cut off.
    """

    name: str
    seconds: float
    command: Sequence[str]
    read: Callable[[str, int | None], Result]
    environment: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False


# ------------------------------------------------------------------------------------------------------- commands


def pytest(*arguments: str, dry: bool) -> tuple[str, ...]:
    options = ("-v", "--tb=short", "-rfEs", "-p", "no:cacheprovider", "--device", "cpu" if dry else "cuda")
    return (sys.executable, "-m", "pytest", *options, *arguments)


CARD = "tests/cuda/test_card{}.py"
# Words in the paths of test files: those with the first of these come first, those with a late one last.
FIRST = ("graphs", "layouts", "special_values", "losses", "with_options", "loop")
LATE = ("bad_", "arguments")
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


def tool(name: str) -> str | None:
    """One of NVIDIA's tools, on PATH or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)])
    return shutil.which(name, path=path)


def sanitizer(check: str, seconds: float) -> Part:
    """Every kernel once, on small tensors, under a tool of compute-sanitizer."""
    path = tool("compute-sanitizer")
    # torch tries calls that may fail. initcheck must see torch's kernels too, since they write what ours read.
    options = ["--tool", check, "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "1000"]
    options += ["--kernel-name", f"kns={OURS}"] * (check != "initcheck")
    tests = pytest(CARD.format("_bits"), "-k", "test_every_kernel and (4x3x32x32 or 3x5x7x9)", dry=False)
    # Each tensor has an allocation of its own, so that an access behind its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(check, seconds, (path, *options, *tests) if path else (), read_sanitizer, environment)


def counters(seconds: float) -> Part:
    """The kernels of the timed operations once each, under Nsight Compute."""
    path, program = tool("ncu"), (sys.executable, "-m", f"{__package__}.counters")
    options = (
        "--kernel-name-base",
        "mangled",
        "--kernel-name",
        f"regex:{OURS}",
        "--metrics",
        ",".join(COUNTERS.values()),
    )
    options += ("--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none")
    return Part("counters", seconds, (path, *options, *program) if path else (), read_counters)


def build_seconds() -> float:
    """About how long a build takes, for one architecture."""
    return BUILD_CPU_SECONDS / (os.cpu_count() or 1) + 30  # in which little else than one file is compiled


def all_parts(*, dry: bool) -> list[Part]:
    def script(name: str, seconds: float, *arguments: str, apart: bool = False) -> Part:
        command = (sys.executable, "-X", "faulthandler", "-m", f"{__package__}.{name}", *arguments, *["--dry"] * dry)
        return Part("-".join([name, *arguments]), seconds, command, read_rows, apart=apart)

    def tests(name: str, seconds: float, *files: str) -> Part:
        return Part(name, seconds, pytest(*files, dry=dry), read_pytest)

    return [
        # Importing torch alone may take nine seconds on a fresh machine; without a card nothing else is worth a start.
        script("machine", 90),
        *([] if dry else [script("build", 3 * build_seconds(), apart=True)]),
        tests("bits", 40, CARD.format("_bits")),
        script("speed", 66, "steps"),
        script("speed", 20, "loop"),
        script("speed", 36, "rest"),
        tests("costs", 25, CARD.format("_costs"), CARD.format("_graphs"), CARD.format("")),
        *([] if dry else [counters(15)]),
        tests("suite", 54, *suite()),
        *([] if dry else [sanitizer("memcheck", 20)]),
        *([] if dry else [sanitizer(check, 8) for check in ("racecheck", "initcheck", "synccheck")]),
    ]
