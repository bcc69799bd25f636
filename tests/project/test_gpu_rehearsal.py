"""`make gpu` from a bare clone to its report, against a pretended card: tests/support/rehearsal.py."""

import pytest
from support.rehearsal import NOT_PRETENDED, PRETENDED, rehearse

import ddpm_ext
from benchmarks.gpu.parts import all_parts
from benchmarks.gpu.speed import GROUPS, Bench


@pytest.mark.long
@pytest.mark.skipif(ddpm_ext.build_info()["cuda"] is None, reason="ddpm_ext is built without CUDA")
def test_the_whole_script(tmp_path):
    """Nothing of the eight minutes on a card is lost by the script: each part has its time, and each row a time."""
    parts, faults = rehearse(tmp_path, "few")
    assert faults == []
    assert [*parts] == [part.name for part in all_parts(dry=False)]
    for name, group in GROUPS.items():
        rows = parts[f"speed-{name}"]["rows"]
        assert len(rows) == len([*group(Bench(dry=True))]) and all(row["call"]["us"] > 0 for row in rows)
    assert parts["build"]["seconds"] > 400  # pretended ones: no other part had to give of its time
    report = (tmp_path / "pretended-card.md").read_text()
    assert all(heading in report for heading in ("## Parts", "## Speed", "## A step", "## Counters"))
    assert all(words in report for words in (*PRETENDED, *NOT_PRETENDED))
