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
    env = {name: value for name, value in os.environ.items() if name != "DDPM_EXT_CUDA"}
    env["PATH"] = os.pathsep.join([str(folder), env["PATH"]])
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
def test_what_a_target_installs(tmp_path):
    for target, installed in (("demo", ["demo"]), ("build", ["demo", "dev"]), ("test", ["demo", "dev"])):
        done = make(tmp_path, "-n", target)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"pip install -q -r requirements-(\w+)\.txt", done.stdout) == installed
        assert "pip install -q --no-build-isolation --no-deps -e ." in done.stdout


@pytest.mark.subprocess
def test_what_a_demo_compiles_without_a_card_is_no_build_for_tests(tmp_path):
    without_cuda = "DDPM_EXT_CUDA=${DDPM_EXT_CUDA:-0} "
    smi = tmp_path / "nvidia-smi"
    for says, stamp, leaves_out in (("No devices", "", True), ("GPU 0: A100", "", False), ("", ".build-done", False)):
        smi.write_text(f"#!/bin/sh\necho {says}\n")
        smi.chmod(0o755)
        (tmp_path / ".venv").mkdir(exist_ok=True)
        (tmp_path / ".venv" / stamp).touch()
        assert (without_cuda in make(tmp_path, "-n", "demo").stdout) == leaves_out
    (tmp_path / ".venv" / ".build-done").rename(tmp_path / ".venv" / ".cpu-build-done")
    compiles = make(tmp_path, "-n", "test").stdout
    assert "--no-deps -e ." in compiles and without_cuda not in compiles
