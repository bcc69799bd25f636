"""The fuzzer runs property tests with new seeds, and reports a failure, a crash and a hang with the seed."""

import re

import pytest
from support import fuzz

EDITS = "peers/test_accelerated_diffusers_traced_state.py::test_samples_that_somebody_edits"
CASES = """
import os, time
from support.choices import for_many

@for_many()
def test_holds(choose):
    assert 0 <= choose.integer(0, 9) <= 9

@for_many()
def test_fails(choose):
    assert choose.integer(0, 9) < 9

@for_many()
def test_crashes(choose):
    if choose.integer(0, 9) == 9:
        os.abort()

@for_many()
def test_hangs(choose):
    time.sleep(99)
"""


@pytest.mark.subprocess
def test_failures_and_crashes_are_reported_with_their_seeds(tmp_path, capsys, monkeypatch):
    path = tmp_path / "test_cases.py"
    path.write_text(CASES)
    found = {name: fuzz.run(f"{path}::test_{name}", 1000, 100)[0] for name in ("holds", "crashes")}
    assert found == {"holds": "", "crashes": "dies of SIGABRT"}
    monkeypatch.setattr(fuzz, "PATIENCE", 0.5)
    assert fuzz.run(f"{path}::test_hangs", 7, 1)[0] == "hangs"
    monkeypatch.undo()
    path.write_text("import pytest\n\npytest.importorskip('no_such_library')" + CASES)
    assert fuzz.run(f"{path}::test_fails", 1000, 100)[0] == ""
    path.write_text(CASES.partition("@for_many()\ndef test_crashes")[0].replace("test_holds", "holds"))
    assert fuzz.main(["0", str(path), "--seed", "1000"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"::test_fails  fails$", said, re.MULTILINE)
    assert said.endswith("1 runs of 1 property tests, 1 failures\n")
    examples, seed = re.search(r"to repeat: DDPM_EXT_FUZZ=(\d+) .*--hypothesis-seed=(\d+) \S*test_fails", said).groups()
    assert fuzz.run(f"{path}::test_fails", int(seed), int(examples))[0] == "fails"


def test_every_property_test_of_the_operators_is_found():
    found = fuzz.property_tests([])
    assert not [name for name in found if "test_fuzz.py" in name]  # its tests of tests are text
    for name in ("ops/test_ops.py::test_reverse_step", "ops/test_loss.py::test_values_and_slopes", EDITS):
        assert str(fuzz.TESTS / name) in found
    assert len(found) > 25 and not any("/cuda/" in test for test in found)
