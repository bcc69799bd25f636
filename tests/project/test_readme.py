"""The commands of README.md, as they stand there."""

import re
import shlex

import pytest

from ddpm_ext.cli.main import build_parser, main

for module in ("diffusers", "matplotlib", "safetensors", "sklearn", "tqdm", "PIL.Image"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def commands(root):
    """The words of each line in the shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (root / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


@pytest.mark.slow
def test_ddpm_ext_runs(commands, tmp_path, monkeypatch):
    """From top to bottom in one folder. Only the training is cut short."""
    monkeypatch.chdir(tmp_path)
    lines = [words[1:] for words in commands if words[0] == "ddpm-ext"]
    assert {words[0] for words in lines} == {"info", "sample", "train"}
    for words in lines:
        if words[0] == "train":
            assert main([*words, "--steps", "2"]) == 0  # the last --steps counts
        else:
            assert main(words) == 0, words
    for words in lines:
        if "--out" in words:
            assert (tmp_path / words[words.index("--out") + 1]).exists(), words


def test_what_is_not_run_is_right(commands, root):
    makefile = (root / "Makefile").read_text()
    project = pytest.importorskip("tomllib").loads((root / "pyproject.toml").read_text())
    needed = {re.match(r"[\w-]+", need)[0] for need in project["build-system"]["requires"]}
    others = [words for words in commands if words[0] != "ddpm-ext"]
    assert [words[:2] for words in others] == [["pip", "install"]] * 2 + [["make", "demo"], ["make", "test"]] + [
        ["torchrun", "--nproc-per-node"]
    ]
    first, second, demo, test, ranks = others
    assert needed <= set(first) and first[-4:] == ["pip", "install", "-U", "setuptools"]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", second[-1])[1].split(",")
    assert " ".join(second[:-1]) in (root / "setup.py").read_text() and project["project"][
        "optional-dependencies"
    ].keys() >= {*extras}
    assert all(f"\n{words[1]}: " in makefile for words in (demo, test)) and ranks[3:5] == ["-m", "ddpm_ext"]
    assert build_parser().parse_args(ranks[5:]).num_images == 50000
