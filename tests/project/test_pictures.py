"""The pictures of docs/sampling.md and docs/classes.md: their commands and code run, and they exist and are small."""

import importlib.util
import re

import numpy as np
import pytest
from support.figure_contents import drawn
from support.pasted import paste

from ddpm_ext.cli.main import build_parser

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("pictures", root / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_picture_has_its_command(root, script):
    """The pages show what their commands and their code write, and the folder holds these files and no others."""
    options = [build_parser().parse_args(arguments) for arguments in script.commands()]
    written = [option.out for option in options if not option.out.endswith(".npz")]
    written += re.findall(r'save_strips\([^)].*"(.+\.png)"\)', "".join(map(script.code, script.PAGES)))
    assert sorted(script.shown()) == sorted(written)
    assert sorted(path.name for path in (root / "docs" / "pictures").iterdir()) == sorted(written)


def test_pictures_are_small_and_not_empty(root):
    paths = set()
    for page in (root / "README.md", root / "docs" / "sampling.md", root / "docs" / "classes.md"):
        paths |= {page.parent / path for path in re.findall(r"!\[.+\]\((.+)\)", page.read_text())}
    assert len(paths) >= 8
    for path in paths:
        assert path.stat().st_size < (1_000_000 if path.suffix == ".gif" else 200_000)
        with Image.open(path) as opened:
            assert opened.width <= 900 and np.asarray(opened.convert("L")).std() > 10


def test_code_of_sampling_runs(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    names = paste(root / "docs" / "sampling.md")
    own = {"samples.png", "three_schedules.png", "values.svg", "x_t.gif"}
    assert {path.name for path in tmp_path.iterdir()} == own
    assert list(drawn(names["figure"].axes[1])) == ["t = 999", "samples", "N(0, 1)"]
    with Image.open("x_t.gif") as opened:
        assert opened.n_frames == 20


@pytest.mark.slow
def test_code_of_classes_runs(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    names = paste(root / "docs" / "classes.md")
    drawn_here = {"guidance.png", "inpainting.png", "interpolation.png"}
    assert {path.name for path in tmp_path.iterdir()} == drawn_here | {"my-classes"}
    filled, known = names["filled"], names["left"]
    assert (filled[..., known] == names["image"][..., known]).all()
