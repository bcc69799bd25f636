"""The fuzzer runs property tests with new seeds, and reports a failure, a crash and a hang with the seed."""

import re

import pytest
from support import fuzz

CASES = """
import itertools, os, time, types
from support import choices
from support.choices import for_many

# A millisecond a look: how many cases there are does not depend on the machine.
choices.time = types.SimpleNamespace(monotonic=(i / 1000 for i in itertools.count()).__next__)

@for_many()
def test_holds(choose):
    assert 0 <= choose.integer(0, 9) <= 9

@for_many()
def test_fails(choose):
    assert choose.random.random() < 0.9

@for_many()
def test_crashes(choose):
    if choose.random.random() > 0.9:
        os.abort()
"""


@pytest.mark.subprocess
def test_failures_and_crashes_are_reported_with_their_seeds(tmp_path, capsys, monkeypatch):
    path = tmp_path / "test_cases.py"
    path.write_text(CASES)
    holds, crashes = (fuzz.run(f"{path}::{name}", 1000, 0.5) for name in ("test_holds", "test_crashes"))
    assert holds.failure == "" and holds.cases == 501
    assert crashes.failure == "dies of SIGABRT" and 0 < crashes.cases < 501
    path.write_text(CASES + "\n@for_many()\ndef test_hangs(choose):\n    time.sleep(99)\n")
    monkeypatch.setattr(fuzz, "START", 0.0)
    monkeypatch.setattr(fuzz, "PATIENCE", 2.0)
    assert fuzz.run(f"{path}::test_hangs", 7, 0.1).failure == "hangs"
    monkeypatch.undo()
    path.write_text(CASES.partition("@for_many()\ndef test_crashes")[0].replace("test_holds", "holds"))
    assert fuzz.main(["1", str(path), "--seed", "1000"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^ *\d+ cases  \S*::test_fails  fails$", said, re.MULTILINE)
    assert re.search(r"^\d+ cases of 1 property tests in \d+ s, 1 failures$", said, re.MULTILINE)
    seed = re.search(r"to repeat: DDPM_EXT_FUZZ=(\d+):0 python -m pytest \S*test_fails", said)[1]
    assert fuzz.run(f"{path}::test_fails", int(seed), 0)[:2] == (1, "fails")


def test_every_property_test_of_the_operators_is_found():
    found = fuzz.property_tests([])
    assert not [name for name in found if "test_fuzz.py" in name]  # its tests of tests are text
    for name in ("ops/test_ops.py::test_reverse_step", "ops/test_loss.py::test_values_and_slopes"):
        assert str(fuzz.TESTS / name) in found
    assert len(found) > 25 and not any("/peers/" in test or "/cuda/" in test for test in found)
