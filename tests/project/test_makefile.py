"""make keeps what is in an environment that exists, shows why it fails, and installs no more than is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder, *arguments):
    """Runs make in a folder without more than what the Makefile's targets depend on."""
    for name in ("Makefile", "requirements-demo.txt", "requirements-dev.txt", "setup.py", "pyproject.toml"):
        shutil.copy(Path(__file__).resolve().parents[2] / name, folder)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.subprocess
def test_an_environment_that_exists_is_never_cleared(tmp_path):
    """Not even one behind a link, by a Python without ensurepip or venv."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / ".venv").symlink_to("elsewhere")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\necho the reason >&2\nexit 1\n')
    python.chmod(0o755)
    done = make(tmp_path, "venv", f"PYTHON={python}")
    assert done.returncode != 0 and "the reason" in done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "-m venv" in calls and "--clear" not in calls and (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.subprocess
def test_what_a_target_installs_and_compiles(tmp_path):
    """Without a card a demo compiles no CUDA, and what it leaves is no build for tests."""
    smi, stamp, without_cuda = tmp_path / "nvidia-smi", tmp_path / ".venv" / ".cpu-build-done", "DDPM_EXT_CUDA=${"
    stamp.parent.mkdir()
    for card, target, *installed in (("", "demo", "demo"), ("GPU 0", "demo", "demo"), ("", "test", "demo", "dev")):
        smi.write_text(f"#!/bin/sh\necho {card}\n")
        smi.chmod(0o755)
        done = make(tmp_path, "-n", target)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"pip install -q -r requirements-(\w+)\.txt", done.stdout) == installed
        assert "pip install -q --no-build-isolation --no-deps -e ." in done.stdout
        assert (without_cuda in done.stdout) == (not card and target == "demo")
        stamp.touch()
    stamp.rename(stamp.with_name(".build-done"))
    assert without_cuda not in make(tmp_path, "-n", "demo").stdout
