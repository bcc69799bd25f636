"""A release: one version, an sdist with all files of git, a wheel with the package only, and the metadata."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from unittest.mock import Mock

import pytest

import ddpm_ext
from ddpm_ext import version as version_module

# Files that a build makes, or private ones. No release may have them. The first six lie in folders that are included.
STRAY = ("csrc/core/step.o", "ddpm_ext/_C.abi3.json", "ddpm_ext/_C.abi3.so", "docs/.DS_Store")
STRAY += ("tests/__pycache__/test_ops.cpython-311.pyc", "tests/test_ops.py~", ".env", ".venv/pyvenv.cfg")
STRAY += ("build/lib/ddpm_ext/ops.py", "dist/ddpm_ext-0.0.1.tar.gz", "notes.txt", "site/index.html")
# What an sdist has besides its sources.
ADDED = re.compile(r"PKG-INFO|setup\.cfg|ddpm_ext\.egg-info/.+")


def git_files(root: Path, *options: str) -> set[str]:
    """The files that exist and that git tracks, or with `--others` would add."""
    command = ["git", "-c", "core.quotePath=false", "ls-files", "--exclude-standard", *options]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (root / name).is_file()}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def version(root) -> str:
    return re.search(r'^version = "(.+?)"', (root / "pyproject.toml").read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def sdist(root, tmp_path_factory) -> Path:
    """An sdist, built from a copy of the sources with stray files among them."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree") / "ddpm_ext"
    if (root / ".git").exists():
        for name in git_files(root, "--cached", "--others"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tree / name)
    else:
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".venv", "build", "dist", "*.egg-info", "*.so"))
    for name in STRAY:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("stray\n")
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(tree), cwd=tree)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def contents(sdist) -> set[str]:
    with tarfile.open(sdist) as opened:
        return {member.name.partition("/")[2] for member in opened if not member.isdir()}


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel, built from the sdist without compiling: all but the extension. Beside it is the one to edit."""
    tree, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as opened:
        opened.extractall(tree, filter="data")
    (source,) = tree.iterdir()
    text = (source / "setup.py").read_text()
    (source / "setup.py").write_text(text.replace("ext_modules=[extension]", "ext_modules=[]"))
    run("-c", f"from setuptools.build_meta import *; build_editable('{out}'); build_wheel('{out}')", cwd=source)
    return next(out.glob("*[!e]-py3-*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(opened.read(name).decode())


def test_version_is_stated_once(root, version):
    """If this fails after a change of pyproject.toml, `make build` installs the package again."""
    assert ddpm_ext.build_info()["version"] == ddpm_ext.__version__ in (version, f"{version}+source")
    files = [root / name for name in ("setup.py", "Makefile", "mkdocs.yml", "README.md")]
    files += (root / "ddpm_ext").rglob("*.py")
    again = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    assert [path for path in files if again.search(path.read_text())] == []


def test_version_where_nothing_is_installed(version, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", Mock(side_effect=importlib.metadata.PackageNotFoundError))
    assert version_module._version() == f"{version}+source"
    package = tmp_path / "ddpm_ext"
    package.mkdir()
    monkeypatch.setattr(version_module, "__file__", str(package / "version.py"))
    assert version_module._version() == "0+unknown"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "7.0"\n')
    assert version_module._version() == "0+unknown"


def test_changelogs_newest_entry_is_this_version(root, version):
    entries = re.findall(r"^## \[(.+?)\] - (\S+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0][0] == version and all(re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", date) for _, date in entries)
    assert all(date != "unreleased" for _, date in entries[1:])


def test_sdist_has_what_git_has(root, contents):
    """The sdist then contains everything that its tests read, and nothing stray."""
    assert contents.isdisjoint(STRAY) and {"setup.py", "csrc/ops/library.cpp", "benchmarks/results/cpu.md"} <= contents
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    sources, tracked = {name for name in contents if not ADDED.fullmatch(name)}, git_files(root)
    assert sorted(tracked - sources) == [] and sorted(sources - tracked - git_files(root, "--others")) == []


def test_wheel_has_the_package_alone(wheel, contents):
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert found == {name for name in contents if name.startswith("ddpm_ext/")} | {"ddpm_ext_command.py"}
    assert {"ddpm_ext/py.typed", "ddpm_ext/models/digits/config.json", "ddpm_ext/training/trainer.py"} <= found


def test_an_editable_install_is_a_folder_on_the_path(wheel):
    """Where type checkers look, which do not run setuptools' hooks."""
    with zipfile.ZipFile(next(wheel.parent.glob("*editable*"))) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".pth"))
        assert (Path(opened.read(name).decode().strip()) / "setup.py").exists()


def test_twine_finds_nothing_wrong(sdist, wheel, tmp_path):
    pytest.importorskip("twine")
    assert run("-m", "twine", "check", "--strict", str(sdist), str(wheel), cwd=tmp_path).count("PASSED") == 2


def test_metadata(root, metadata, version):
    assert (metadata["Name"], metadata["Version"]) == ("ddpm-ext", version)
    assert metadata["Author"] == "The ddpm_ext authors"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata.get_payload().strip() == (root / "README.md").read_text().strip()
    torch = re.match(r"\d+\.\d+", importlib.metadata.version("torch"))[0]
    assert f"torch=={torch}.*" in metadata.get_all("Requires-Dist")  # which a module is compiled for
    citation = pytest.importorskip("yaml").safe_load((root / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["title"] == "ddpm_ext" and "version" not in citation  # which comes from pyproject.toml
    assert [author["name"] for author in citation["authors"]] == [metadata["Author"]]


def test_what_development_needs_is_pinned_within_its_range(root, metadata):
    requirements = pytest.importorskip("packaging.requirements")
    demo, dev = ((root / f"requirements-{name}.txt").read_text().splitlines() for name in ("demo", "dev"))
    assert "-r requirements-demo.txt" in dev
    pins = {}
    for line in [*demo, *dev]:
        if not line.startswith(("#", "-r ")):
            pin = requirements.Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "==", line
            assert pin.name not in pins, line
            pins[pin.name] = only.version
    needs = [requirements.Requirement(text) for text in metadata.get_all("Requires-Dist")]
    names = {need.name for need in needs} - {"ddpm-ext"}
    assert {"torch", "build", "twine", "mkdocs"} <= names and sorted(names - set(pins)) == []
    for need in needs:
        assert need.name == "ddpm-ext" or need.specifier.contains(pins[need.name]), need
