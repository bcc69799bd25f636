"""The measured numbers of README.md and docs/ are those of benchmarks/results, by docs/claims.py."""

import importlib.util
import re
import shutil
import sys

import pytest


@pytest.fixture(scope="module")
def claims(root):
    spec = importlib.util.spec_from_file_location("claims", root / "docs" / "claims.py")
    module = sys.modules["claims"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_was_measured(claims):
    assert claims.write(check=True) == []


def other(text: str) -> str:
    """With another last digit."""
    return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), text)


def with_errors(claims, claim, text: str) -> list[str]:
    """Pages with one wrong number each: the first of a sentence, or the last of each row of a table."""
    if isinstance(claim, claims.Sentence):
        found = claim.found(text)
        return [text[: found.start(1)] + other(found[1]) + text[found.end(1) :]]
    start = text.index("\n|---", text.index(claim.before))
    rows = text[start:].partition("\n\n")[0].splitlines()[2:]
    return [text[:start] + text[start:].replace(row, other(row), 1) for row in rows]


def test_a_changed_number_is_found_and_written_back(claims, root, tmp_path):
    every = claims.claims()
    assert len(every) > 35
    for page in {claim.page for claim in every}:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / page, tmp_path / page)
    for claim in every:
        text = (root / claim.page).read_text()
        for page in with_errors(claims, claim, text):
            assert page != text
            (tmp_path / claim.page).write_text(page)
            assert [each.partition(":")[0] for each in claims.write(tmp_path, check=True)] == [claim.page]
            claims.write(tmp_path)
            assert (tmp_path / claim.page).read_text() == text


def test_a_sentence_that_is_gone_is_an_error(claims, root, tmp_path):
    claim = claims.Sentence("README.md", "drawn # times by nobody", ["1"])
    with pytest.raises(ValueError, match=r"README\.md has 0 times"):
        claim.written((root / "README.md").read_text())
