"""Each example runs as a user would run it, and prints what it claims."""

import os
import re
import subprocess
import sys

import pytest

NEEDS = {
    "tutorial_loop": (),
    "diffusers_pipeline": ("diffusers", "safetensors"),
    "guided_diffusion_script": (),  # prints a sentence if guided_diffusion is missing
    "training_loop": ("sklearn",),
    "trajectory_picture": ("diffusers", "matplotlib", "safetensors"),
}
# How the examples of accelerate() print the largest difference between the images.
APART = r"by (\d[.]\de[-+]\d+) at most|at most (\d[.]\de[-+]\d+) apart"


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
    if name == "trajectory_picture":
        assert (tmp_path / "trajectory.png").stat().st_size > 10_000
    elif name == "training_loop":
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
        assert losses[-1] < losses[0]
        samples, noise = map(float, re.search(r"samples ([\d.]+), noise ([\d.]+)", done.stdout).groups())
        assert samples < noise / 2
    elif "not installed" not in done.stdout:
        apart = [float(next(filter(None, found))) for found in re.findall(APART, done.stdout)]
        assert apart
        assert max(apart) < 1e-4
