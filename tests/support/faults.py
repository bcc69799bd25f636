"""The power of the tests: plants the faults of faults.txt one by one, and notes which test sees each of them first.

    python tests/support/faults.py check
    python tests/support/faults.py build FOLDER
    python tests/support/faults.py run FOLDER RECORD [--only NAME ...]

`check` says whether each fault's old text still occurs once. `build` copies the tree to FOLDER and compiles the copy, a
few minutes. All faults in C++ are in that one module: each old text becomes a choice by the environment variable
DDPM_FAULT, and without it the module is the usual one, but for its optimisation. `run` chooses these, and plants those
in Python and in CUDA sources, which tests compile, in the copy. It runs each fault's tests until one fails: the narrow
ones, then the fast ones of the others. It writes RECORD, which is JSON, after each fault, so that a run that is killed
goes on where it was. A test counts only if it passes without the fault, which is tried last. The tree itself is never
changed.

After a change of code, edit faults.txt until `check` is content, and compare the two records fault by fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIST = "tests/support/faults.txt"
CHOICES = "tests/support/choices.py"
# Of the narrow and of the wide tests: seconds, and options of pytest.
STAGES = ((90,), (300, "-m", "not subprocess and not slow"))
COMPILING = 900  # seconds for tests that compile CUDA sources
CONTROL = 1800  # seconds
HEADER = re.compile(r"(\w+), (\S+)\n([\w/. ]+)(?:\| ([\w/. ]+))?")
FIRST_RED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)

CHOICE = """// Which fault is planted, 0 for none.
#pragma once
#include <stdlib.h>
inline const int ddpm_fault = getenv("DDPM_FAULT") == nullptr ? 0 : atoi(getenv("DDPM_FAULT"));
"""


class Fault(NamedTuple):
    """number: from 1 on. tests: the narrow and the wide ones, paths below tests/. seen: the test that the list says saw
    it, or an empty string."""

    number: int
    name: str
    file: str
    tests: list[list[str]]
    old: str
    new: str
    seen: str

    @property
    def of_cuda(self) -> bool:
        return self.file.startswith("csrc/cuda/")

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/") and not self.of_cuda


class Outcome(NamedTuple):
    """How a run of pytest ended: "green", "red" with the first test that failed, "crash", or "time limit"."""

    ending: str
    test: str
    seconds: float


# ------------------------------------------------------------------------------------------------------------ the list


def read_faults(root: Path) -> list[Fault]:
    """The faults of a tree's list. Raises ValueError for a part of it that is none."""
    found: list[Fault] = []
    for part in (root / LIST).read_text().split("\n@ ")[1:]:
        first, tests, *rest = part.splitlines()
        header = HEADER.fullmatch(f"{first}\n{tests}")
        old, new, seen = ("\n".join(line[2:] for line in rest if line.startswith(sign)) for sign in ("- ", "+ ", "= "))
        if header is None or not old:
            raise ValueError(f"{LIST}: cannot read {first!r}")
        name, file, *stages = header.groups()
        found.append(Fault(len(found) + 1, name, file, [stage.split() for stage in stages if stage], old, new, seen))
    return found


def check(root: Path, faults: list[Fault]) -> list[str]:
    """What is wrong with the list: names that come twice, and texts and tests that are not where it says."""
    wrong = [fault.name for fault in faults if [each.name for each in faults].count(fault.name) > 1]
    found = [f"{name}: this name comes twice" for name in dict.fromkeys(wrong)]
    for fault in faults:
        path = root / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{fault.name}: its old text occurs {count} times in {fault.file}, expected once")
        missing = [test for stage in fault.tests for test in stage if not (root / "tests" / test).exists()]
        found += [f"{fault.name}: there is no tests/{test}" for test in missing]
        path, _, test = fault.seen.removesuffix(", fast").partition("::")
        if fault.seen and f"\ndef {test}(" not in (root / "tests" / path).read_text():
            found.append(f"{fault.name}: there is no {test} in tests/{path}")
    return found


# ------------------------------------------------------------------------------------------------------------ the copy


def choice(fault: Fault) -> str:
    """C++ that is the old text or the new one, as DDPM_FAULT says."""
    if fault.old.endswith(";"):
        return f"if (ddpm_fault == {fault.number}) {{ {fault.new} }} else {{ {fault.old} }}"
    return f"(ddpm_fault == {fault.number} ? ({fault.new}) : ({fault.old}))"


def write(path: Path, text: str) -> None:
    """Writes a file unless it has that text: what is compiled already stays so."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(folder: Path) -> None:
    faults = read_faults(ROOT)
    if wrong := check(ROOT, faults):
        sys.exit("\n".join(wrong))
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    edited = {fault.file for fault in faults if fault.compiled} | {"setup.py", CHOICES}
    for name in names:
        if name not in edited and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in edited - {"setup.py", CHOICES}:
        text = (ROOT / name).read_text()
        for fault in faults:
            if fault.file == name:
                text = text.replace(fault.old, choice(fault))
        write(folder / name, '#include "faults.h"\n' + text)
    write(folder / "csrc/faults.h", CHOICE)
    # Hypothesis takes minutes to simplify an example that fails, which nobody reads here.
    phases = "database=None, phases=[hypothesis.Phase.generate]"
    write(folder / CHOICES, (ROOT / CHOICES).read_text().replace("database=None", phases))
    # Most of a compiler's time goes into optimisation. The bits don't depend on it.
    write(folder / "setup.py", (ROOT / "setup.py").read_text().replace('"-O3", "-g0"', '"-O1", "-g0"'))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | {"DDPM_EXT_CUDA": "0"})


@contextmanager
def planted(folder: Path, fault: Fault) -> Iterator[dict[str, str]]:
    """The environment for tests of a copy that has the fault."""
    if fault.compiled:
        yield {"DDPM_FAULT": str(fault.number)}
        return
    path, kept = folder / fault.file, folder / f"{fault.file}.kept"
    shutil.copy2(path, kept)
    path.write_text(path.read_text().replace(fault.old, fault.new))
    try:
        yield {}
    finally:
        os.replace(kept, path)  # with its time, by which Python knows whether what it compiled is up to date


# ----------------------------------------------------------------------------------------------------------- the tests


def pytest(folder: Path, tests: list[str], env: dict[str, str], limit: float, *options: str) -> tuple[Outcome, str]:
    """Runs tests of the copy; how it ended, and what pytest wrote."""
    here = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *options, *tests]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | here | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome("time limit", "", limit), ""
    seconds = round(time.monotonic() - begin, 1)
    if process.returncode in (4, 5):  # no such tests
        sys.exit(text)
    first = FIRST_RED.search(text)
    ending = {0: "green", 1: "red", 2: "red"}.get(process.returncode, "crash")
    return Outcome(ending, first[1] if first and ending == "red" else "", seconds), text


def try_fault(folder: Path, fault: Fault) -> Outcome:
    """Runs the fault's tests, the narrow ones first, until some see it."""
    seconds, ending = 0.0, "green"
    with planted(folder, fault) as env:
        for tests, (limit, *options) in zip(fault.tests, STAGES, strict=False):
            limit = COMPILING if fault.of_cuda else limit
            outcome, _ = pytest(folder, [f"tests/{test}" for test in tests], env, limit, "-x", *options)
            seconds = round(seconds + outcome.seconds, 1)
            if outcome.ending in ("red", "crash"):
                return outcome._replace(seconds=seconds)
            if outcome.ending != "green":
                ending = outcome.ending
    return Outcome(ending, "", seconds)


def red_without_fault(folder: Path, tests: list[str]) -> set[str]:
    """Those of the tests that fail in the copy as it is."""
    if not tests:
        return set()
    outcome, text = pytest(folder, tests, {}, CONTROL)
    if outcome.ending not in ("green", "red"):
        sys.exit(f"without a fault the tests end with: {outcome.ending}")
    return set(FIRST_RED.findall(text))


def run(folder: Path, record: Path, only: list[str]) -> None:
    for kept in folder.rglob("*.kept"):  # of a run that was killed
        os.replace(kept, kept.with_suffix(""))
    faults = read_faults(folder)
    found: dict[str, dict[str, object]] = json.loads(record.read_text()) if record.is_file() else {}
    for name in only:
        found.pop(name, None)
    for fault in faults:
        if fault.name in found or (only and fault.name not in only):
            continue
        outcome = try_fault(folder, fault)
        found[fault.name] = {"file": fault.file, **outcome._asdict()}
        record.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{fault.number:3} {fault.name}: {outcome.ending} {outcome.test} ({outcome.seconds} s)", flush=True)
    unchecked = {name: str(entry["test"]) for name, entry in found.items() if entry["test"] and "checked" not in entry}
    also_red = red_without_fault(folder, list(dict.fromkeys(unchecked.values())))
    for name, test in unchecked.items():
        found[name]["checked"] = True
        if test in also_red:
            found[name]["ending"] = "red without it"
            print(f"{name}: {test} fails without the fault, too")
    record.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("build").add_argument("folder", type=Path)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path)
    runs.add_argument("record", type=Path)
    runs.add_argument("--only", nargs="+", default=[], metavar="NAME")
    given = parser.parse_args()
    if given.command == "check":
        sys.exit("\n".join(check(ROOT, read_faults(ROOT))) or 0)
    if given.command == "build":
        build(given.folder.resolve())
    else:
        run(given.folder.resolve(), given.record.resolve(), given.only)


if __name__ == "__main__":
    main()
