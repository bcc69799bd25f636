"""Each example runs as a person would run it, and says what it is to say."""

import os
import re
import subprocess
import sys

import pytest

NEEDS = {
    "tutorial_loop": (),
    "diffusers_pipeline": ("diffusers", "safetensors"),
    "guided_diffusion_script": (),  # says so where guided_diffusion is missing
    "training_loop": ("sklearn",),
    "trajectory_picture": ("diffusers", "matplotlib", "safetensors"),
}


def test_all_are_listed(root):
    assert {path.stem for path in (root / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_runs(root, tmp_path, name):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, root / "examples" / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d|not installed", done.stdout)
