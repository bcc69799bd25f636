"""Each example runs as a user would run it, and prints what it claims."""

import re
import runpy

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NEEDS)
def test_runs(root, tmp_path, monkeypatch, capsys, name):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(root / "examples" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    if name == "trajectory_picture":
        assert (tmp_path / "trajectory.png").stat().st_size > 10_000
    elif name == "training_loop":
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
        assert losses[-1] < losses[0]
        samples, noise = map(float, re.search(r"samples ([\d.]+), noise ([\d.]+)", said).groups())
        assert samples < noise / 2
    elif "not installed" not in said:
        apart = [float(next(filter(None, found))) for found in re.findall(APART, said)]
        assert apart and max(apart) < 1e-4
