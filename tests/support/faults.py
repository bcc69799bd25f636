"""Measures what the tests detect: plants the faults of faults.txt one by one, and records which test fails first.

    python tests/support/faults.py check
    python tests/support/faults.py build FOLDER
    python tests/support/faults.py run FOLDER RECORD [--only NAME ...]

`check` checks that each fault's old text still occurs exactly once, that its tests exist, and that its name is unique.

`build` copies the working tree to FOLDER and compiles the copy, which takes a few minutes. All faults in C++ outside
csrc/cuda are compiled into one module: each old text becomes an expression or a statement that is the new text if the
environment variable DDPM_FAULT has the fault's number. Without the variable, the module does what it does without
faults.

`run` selects a C++ fault by DDPM_FAULT. It plants a fault in Python, or in a CUDA source, which tests compile, by
editing the copy. For each fault, faults.txt names narrow tests, which should detect it, and wide tests. `run` runs the
narrow tests, then the wide tests without the markers subprocess and slow, until a test fails. After each fault it
writes RECORD (JSON), so that an interrupted run can continue. At the end it runs the tests that failed once more, in
the copy without faults: a test has detected a fault only if it passes there. The working tree is never changed.

After a change of code, edit faults.txt until `check` passes, run `build` and `run` again, and compare the new record
with the old one fault by fault.
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
# Of the narrow and of the wide tests: the time limit in seconds, and options of pytest.
STAGES = ((90,), (300, "-m", "not subprocess and not slow"))
COMPILING = 900  # the time limit in seconds of tests that compile CUDA sources
CONTROL = 1800  # the time limit in seconds of all tests without a fault
HEADER = re.compile(r"(\w+), (\S+)\n([\w/. ]+)(?:\| ([\w/. ]+))?")
FIRST_RED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)

CHOICE = """// Which fault is planted, 0 for none.
#pragma once
#ifdef __CUDACC__  // A CUDA source has its faults edited into the copy, so those of core are left out.
constexpr int ddpm_fault = 0;
#else
#include <stdlib.h>
inline const int ddpm_fault = getenv("DDPM_FAULT") == nullptr ? 0 : atoi(getenv("DDPM_FAULT"));
#endif
"""


class Fault(NamedTuple):
    """An entry of the list.

    number: its number, from 1 on. tests: the narrow and the wide tests, as paths below tests/. seen: the test that
        detects the fault according to the list, or "".
    """

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
    """How a run of pytest ended: "green", "red", "crash" or "time limit". test: with "red", the first failed test."""

    ending: str
    test: str
    seconds: float


# ------------------------------------------------------------------------------------------------------------ the list


def read_faults(root: Path) -> list[Fault]:
    """The faults in the list of a working tree. Raises ValueError for an entry that cannot be read."""
    faults: list[Fault] = []
    for part in (root / LIST).read_text().split("\n@ ")[1:]:
        first, tests, *rest = part.splitlines()
        header = HEADER.fullmatch(f"{first}\n{tests}")
        old, new, seen = ("\n".join(line[2:] for line in rest if line.startswith(sign)) for sign in ("- ", "+ ", "= "))
        if header is None or not old:
            raise ValueError(f"{LIST}: cannot read {first!r}")
        name, file, *stages = header.groups()
        faults.append(Fault(len(faults) + 1, name, file, [stage.split() for stage in stages if stage], old, new, seen))
    return faults


def check(root: Path, faults: list[Fault]) -> list[str]:
    """The errors in the list: names that occur twice, old texts that do not occur once, tests that do not exist."""
    repeated = [fault.name for fault in faults if [each.name for each in faults].count(fault.name) > 1]
    errors = [f"{name}: this name comes twice" for name in dict.fromkeys(repeated)]
    for fault in faults:
        path = root / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if count != 1:
            errors.append(f"{fault.name}: its old text occurs {count} times in {fault.file}, expected once")
        missing = [test for stage in fault.tests for test in stage if not (root / "tests" / test).exists()]
        errors += [f"{fault.name}: there is no tests/{test}" for test in missing]
        path, _, test = fault.seen.removesuffix(", fast").partition("::")
        if fault.seen and f"\ndef {test}(" not in (root / "tests" / path).read_text():
            errors.append(f"{fault.name}: there is no {test} in tests/{path}")
    return errors


# ------------------------------------------------------------------------------------------------------------ the copy


def choice(fault: Fault) -> str:
    """C++ that runs the fault's new text if DDPM_FAULT has the fault's number, and otherwise the old text."""
    if fault.old.endswith(";"):
        return f"if (ddpm_fault == {fault.number}) {{ {fault.new} }} else {{ {fault.old} }}"
    return f"(ddpm_fault == {fault.number} ? ({fault.new}) : ({fault.old}))"


def write(path: Path, text: str) -> None:
    """Writes a file unless it already has that text, so that it is not compiled again."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(folder: Path) -> None:
    """The command `build`."""
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
        write(folder / name, '#include "ddpm_fault.h"\n' + text)
    write(folder / "csrc/ddpm_fault.h", CHOICE)
    # Without the phase in which hypothesis simplifies a failing example, which takes minutes.
    phases = "database=None, phases=[hypothesis.Phase.generate]"
    write(folder / CHOICES, (ROOT / CHOICES).read_text().replace("database=None", phases))
    # Compiles with -O1, which takes less time than -O3. The results have the same bits.
    write(folder / "setup.py", (ROOT / "setup.py").read_text().replace('"-O3", "-g0"', '"-O1", "-g0"'))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | {"DDPM_EXT_CUDA": "0"})


@contextmanager
def planted(folder: Path, fault: Fault) -> Iterator[dict[str, str]]:
    """A context in which the copy has the fault. Yields the environment variables that its tests need.

    A fault in C++ is already compiled into the copy, and a variable selects it.
    """
    if fault.compiled:
        yield {"DDPM_FAULT": str(fault.number)}
        return
    path, backup = folder / fault.file, folder / f"{fault.file}.kept"
    shutil.copy2(path, backup)
    path.write_text(path.read_text().replace(fault.old, fault.new))
    try:
        yield {}
    finally:
        os.replace(backup, path)  # restores the file's time, too, by which Python decides whether to recompile it


# ----------------------------------------------------------------------------------------------------------- the tests


def pytest(folder: Path, tests: list[str], env: dict[str, str], limit: float, *options: str) -> tuple[Outcome, str]:
    """Runs tests of the copy. Returns the outcome and pytest's output."""
    variables = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *options, *tests]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | variables | env,
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
    """Plants a fault and runs its narrow tests, then its wide tests, until one fails."""
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
    """The tests that fail in the copy without a fault."""
    if not tests:
        return set()
    outcome, text = pytest(folder, tests, {}, CONTROL)
    if outcome.ending not in ("green", "red"):
        sys.exit(f"without a fault the tests end with: {outcome.ending}")
    return set(FIRST_RED.findall(text))


def run(folder: Path, record: Path, only: list[str]) -> None:
    """The command `run`. With names in `only`, tries only these faults."""
    for backup in folder.rglob("*.kept"):  # backups of a run that was killed
        os.replace(backup, backup.with_suffix(""))
    faults = read_faults(folder)
    tried: dict[str, dict[str, object]] = json.loads(record.read_text()) if record.is_file() else {}
    for name in only:
        tried.pop(name, None)
    for fault in faults:
        if fault.name in tried or (only and fault.name not in only):
            continue
        outcome = try_fault(folder, fault)
        tried[fault.name] = {"file": fault.file, **outcome._asdict()}
        record.write_text(json.dumps(tried, indent=1) + "\n")
        print(f"{fault.number:3} {fault.name}: {outcome.ending} {outcome.test} ({outcome.seconds} s)", flush=True)
    unchecked = {name: str(entry["test"]) for name, entry in tried.items() if entry["test"] and "checked" not in entry}
    also_red = red_without_fault(folder, list(dict.fromkeys(unchecked.values())))
    for name, test in unchecked.items():
        tried[name]["checked"] = True
        if test in also_red:
            tried[name]["ending"] = "red without it"
            print(f"{name}: {test} fails without the fault, too")
    record.write_text(json.dumps(tried, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("build").add_argument("folder", type=Path)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path)
    runs.add_argument("record", type=Path)
    runs.add_argument("--only", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args()
    if options.command == "check":
        sys.exit("\n".join(check(ROOT, read_faults(ROOT))) or 0)
    if options.command == "build":
        build(options.folder.resolve())
    else:
        run(options.folder.resolve(), options.record.resolve(), options.only)


if __name__ == "__main__":
    main()
