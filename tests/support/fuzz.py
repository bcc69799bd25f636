"""The fuzzer: the property tests (`@for_many`) with seeds that no run had before, for a given time.

    python tests/support/fuzz.py SECONDS [TESTFILE ...] [--seed N]

Each test runs in a process of its own, so that a crash or a hang is one failure among others. A failure is reported
with its seed and with the command that repeats it; the exit code is then 1. `make fuzz SECONDS=600` runs it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
# Other libraries' code, kernels that are compiled first, and the fuzzer's own tests, which hold others as text.
LEFT_OUT = ("peers", "cuda", "test_fuzz.py")
# What a process needs before its first case, and how long a case may hang.
START, PATIENCE = 5.0, 120.0
PROPERTY = re.compile(r"^@for_many\(.*\)\n(?:@.*\n)*def (test_\w+)", re.MULTILINE)


class Outcome(NamedTuple):
    """How many cases of a test ran, and what failed: empty if nothing did."""

    cases: int
    failure: str
    output: str


def property_tests(files: list[Path]) -> list[str]:
    """The property tests of the files, or of all, as pytest names them."""
    found = files or [
        path for path in sorted(TESTS.rglob("test_*.py")) if not {path.name, path.parent.name} & {*LEFT_OUT}
    ]
    return [f"{path}::{name}" for path in found for name in PROPERTY.findall(path.read_text())]


def run(test: str, seed: int, seconds: float) -> Outcome:
    """One test from a seed on, for as many seconds; each of its parametrized forms alike."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DDPM_EXT_FUZZ": f"{seed}:{seconds}", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--tb=short", test]
    child = subprocess.Popen(
        command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = child.communicate(timeout=10 * (seconds + START) + PATIENCE)
        failure = ""
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        failure = "hangs"
    if not failure and child.returncode < 0:
        failure = f"dies of {signal.Signals(-child.returncode).name}"
    elif not failure and child.returncode != 0:
        failure = "fails"
    return Outcome(len(re.findall(r"^\.?seed \d+$", output, re.MULTILINE)), failure, output)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the property tests with new seeds.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seed", type=int, help="the first seed; by default a random one")
    options = parser.parse_args(arguments)
    first = random.SystemRandom().randrange(2**40) if options.seed is None else options.seed
    tests = property_tests([path.resolve() for path in options.files])
    random.Random(first).shuffle(tests)
    begin, ran, failed = time.monotonic(), {}, 0
    print(f"{len(tests)} property tests, from seed {first} on", flush=True)
    while True:
        for i, test in enumerate(tests):
            left = options.seconds - (time.monotonic() - begin)
            if left < START and ran:
                break
            share = max(left / (len(tests) - i) - START, 2.0)
            outcome = run(test, first, share)
            ran[test] = ran.get(test, 0) + outcome.cases
            name = os.path.relpath(test.partition("::")[0], TESTS.parent) + "::" + test.partition("::")[2]
            print(f"{outcome.cases:7} cases  {name}  {outcome.failure}".rstrip(), flush=True)
            if outcome.failure:
                failed += 1
                last = re.findall(r"^\.?seed (\d+)$", outcome.output, re.MULTILINE)[-1:] or [str(first)]
                print(outcome.output[-3000:])
                print(f"to repeat: DDPM_EXT_FUZZ={last[0]}:0 python -m pytest {name}", flush=True)
            first += outcome.cases
        if options.seconds - (time.monotonic() - begin) < START:
            break
    cases, spent = sum(ran.values()), time.monotonic() - begin
    print(f"{cases} cases of {len(ran)} property tests in {spent:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
