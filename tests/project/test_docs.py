"""The code in the documentation runs, and its tables are right."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from support.pasted import BLOCK, paste

from ddpm_ext.cli.main import build_parser
from ddpm_ext.integrations.k_diffusion import GUIDED, NAMES
from ddpm_ext.losses.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS, spaced_timesteps
from ddpm_ext.tables.variances import VARIANCES
from ddpm_ext.tables.weightings import WEIGHTINGS

DOCS = Path(__file__).resolve().parents[2] / "docs"
# test_pictures.py and test_reference_pages.py paste three more, and look at what comes out.
PAGES = [
    DOCS.parent / "README.md",
    *(p for p in sorted(DOCS.rglob("*.md")) if p.name not in ("index.md", "sampling.md", "classes.md")),
]
# What tuning.md runs takes three seconds, and tests/tuning has its parts.
PASTED = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name == "tuning.md"))
    for page in PAGES
    if BLOCK.search(page.read_text())
]
WRITTEN = {"training.md": {"my-run"}, "diffusers.md": {"tuned.json"}, "tables.md": {"mine.json", "mine.png"}}


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
@pytest.mark.parametrize("page", PASTED)
def test_code_of_a_page_can_be_pasted(page, tmp_path, monkeypatch):
    """From top to bottom, into a fresh Python: each page imports and makes all that it uses."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("diffusers")
    paste(page)
    assert {path.name for path in tmp_path.iterdir()} >= WRITTEN.get(page.name, set())


def test_commands_of_the_pages_are_right(root):
    """Each is parsed as it stands. Those of README.md are run, by a test of their own."""
    seen = 0
    for page in [*PAGES, DOCS / "sampling.md", DOCS / "classes.md", *(root / "ddpm_ext" / "models").rglob("README.md")]:
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for command in re.findall(r"(?:^ddpm-ext|-m ddpm_ext) (.+)", block.replace("\\\n", " "), re.MULTILINE):
                try:
                    build_parser().parse_args(shlex.split(command, comments=True))
                except SystemExit:
                    pytest.fail(f"{page.name}: {command}")
                seen += 1
    assert seen > 40


def test_every_choice_is_documented(root):
    pages = {page: (root / "docs" / f"{page}.md").read_text() for page in ("sampling", "options", "training_options")}
    table = pages["sampling"].partition("| `spacing=`")[2].partition("\n\n")[0]
    assert set(re.findall(r'`"([\w,]+)"`', table)) == {*SPACINGS, "ddim5", "2,3"}
    told = {page: set(re.findall(r'`"(\w+)"`', text)) for page, text in pages.items()}
    assert {*LOSSES, *BOUNDS, "simple", *WEIGHTINGS, *TIMESTEP_SAMPLERS} <= told["training_options"]
    assert set(SAMPLERS) <= told["sampling"]
    assert {name for name in VARIANCES if name.startswith("learned")} <= told["options"]
    rows = re.findall(r'^\| `"([a-z\d,]+)"` \| ([\d ]+\d)', pages["sampling"], re.MULTILINE)
    assert len(rows) == 8
    for spacing, timesteps in rows:
        steps = None if spacing[-1].isdigit() else 5
        assert spaced_timesteps(1000, steps, spacing).tolist() == [int(t) for t in timesteps.split()]
    section = (root / "docs" / "k_diffusion.md").read_text().partition("among them")[2].partition("Their loops")[0]
    named = set(re.findall(r"[ (]`(\w+)`", section)) - {"GUIDED"}
    assert len(named) == 16 and set(GUIDED) <= named <= {*NAMES, *GUIDED}


def test_paths_that_the_pages_name_exist(root):
    """Those that are no links, which tests/project/test_reference_pages.py follows. NAME stands for a new file."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", root / "mkdocs.yml", *(root / "docs").rglob("*.md")]
    pages.append(root / "ddpm_ext" / "integrations" / "ADDING.md")
    named = re.compile(r"(?<![\w/.])((?:benchmarks|csrc|ddpm_ext|docs|examples|tests)/[\w./-]*\w)")
    found = {(path, page.name) for page in pages for path in named.findall(page.read_text()) if "NAME" not in path}
    assert len(found) > 60 and sorted((path, page) for path, page in found if not (root / path).exists()) == []


def test_every_promise_has_a_test(root):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (root / "docs" / "developers" / "guarantees.md").read_text())
    assert len(named) > 20
    assert not [f"{path}::{name}" for path, name in named if f"def {name}(" not in (root / path).read_text()]


def test_messages_on_the_page_of_troubles_are_in_the_source(root):
    """In both, three dots stand for each part that varies."""
    texts = []
    for tree in (ast.parse(path.read_text()) for path in (root / "ddpm_ext").rglob("*.py")):
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
    quoted = re.findall(r"^\| `([^`]+)`", (root / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) == 10
    assert [message for message in quoted if not any(message.strip(" .") in text for text in texts)] == []
