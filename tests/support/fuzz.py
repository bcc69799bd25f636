"""The fuzzer: runs the property tests (`@for_many`) with new random seeds for SECONDS seconds.

    python tests/support/fuzz.py SECONDS [TESTFILE ...] [--seed N]

Each test runs in a separate process, so a crash or a hang is a failure like any other. For a failure, the fuzzer prints
the command that repeats it, and its exit code is then 1. `make fuzz SECONDS=600` runs it.
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

TESTS = Path(__file__).resolve().parents[1]
# The folder and the file that are not fuzzed: tests that compile kernels first, and the fuzzer's tests, whose strings
# contain property tests.
LEFT_OUT = ("cuda", "test_fuzz.py")
EXAMPLES, PATIENCE = 200, 600.0  # the examples of a test's process, and its time limit in seconds
# A test decorated with @for_many, or a test with a nested function decorated with it.
PROPERTY = re.compile(
    r"^@for_many\(.*\)\n(?:@.*\n)*def (test_\w+)|^def (test_\w+)(?=.*\n(?:(?:[ )].*)?\n)*? +@for_many\()", re.MULTILINE
)


def property_tests(files: list[Path]) -> list[str]:
    """The pytest ids of the property tests in the files. Without files, those in all test files."""
    paths = files or [
        path for path in sorted(TESTS.rglob("test_*.py")) if not {path.name, path.parent.name} & {*LEFT_OUT}
    ]
    return [f"{path}::{''.join(names)}" for path in paths for names in PROPERTY.findall(path.read_text())]


def run(test: str, seed: int, examples: int) -> tuple[str, str]:
    """Runs a test with all of its parameters. Returns how it failed, or "" if it did not fail, and its output."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DDPM_EXT_FUZZ": str(examples), "PYTHONPATH": paths}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"--hypothesis-seed={seed}"]
    try:
        done = subprocess.run(
            [*words, test], cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "hangs", ""
    if done.returncode < 0:
        return f"dies of {signal.Signals(-done.returncode).name}", done.stdout + done.stderr
    skipped = re.search(r"^1 skipped in", done.stdout, re.MULTILINE)  # its library is missing
    return "fails" if done.returncode and not skipped else "", done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the property tests with new seeds.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seed", type=int, help="the first seed; by default a random one")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**40) if options.seed is None else options.seed
    tests = property_tests([path.resolve() for path in options.files])
    end, rounds, ran, failed = time.monotonic() + options.seconds, 0, 0, 0
    print(f"{len(tests)} property tests, from seed {seed} on", flush=True)
    while not ran or time.monotonic() < end:
        examples = EXAMPLES if rounds else EXAMPLES // 10  # few in the first round, so that every test runs soon
        for test in random.Random(seed).sample(tests, len(tests)):
            failure, output = run(test, seed, examples)
            name = os.path.relpath(test.partition("::")[0], TESTS.parent) + "::" + test.partition("::")[2]
            print(f"{name}  {failure}".rstrip(), flush=True)
            if failure:
                failed += 1
                repeat = f"DDPM_EXT_FUZZ={examples} python -m pytest --hypothesis-seed={seed} {name}"
                print(f"{output[-3000:]}\nto repeat: {repeat}", flush=True)
            ran += 1
            if time.monotonic() > end:
                break
        seed, rounds = seed + 1, rounds + 1
    print(f"{ran} runs of {len(tests)} property tests, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
