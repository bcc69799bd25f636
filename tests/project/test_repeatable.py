"""Every run of the tests has the same inputs, in any order, in any number of processes and on a slow machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

DRAWS = """
import random
import numpy as np
import pytest
import torch

def draw():
    return torch.rand(()).item(), np.random.rand(), random.random()

@pytest.fixture(scope="module")
def shared():
    return draw()

@pytest.mark.parametrize("name", ["a", "b"])
def test_draws(name, shared):
    print("drawn", name, draw())
"""


@pytest.mark.subprocess
def test_what_a_test_draws_does_not_depend_on_the_tests_before(tmp_path):
    path = tmp_path / "test_draws.py"
    path.write_text(DRAWS)
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "conftest", "--rootdir", str(tmp_path)]
    runs = [[*options, *(f"{path}::test_draws[{name}]" for name in names)] for names in ("ab", "ba", "b")]
    code = f"import pytest\nfor run in {runs!r}:\n    assert pytest.main(run) == 0\n    print('next')"
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_ADDOPTS": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("\nnext\n")[:-1]
    drawn = [{line.partition("drawn ")[2] for line in part.splitlines() if "drawn " in line} for part in parts]
    assert len(drawn[0]) == 2 and drawn[0] == drawn[1] > drawn[2]
