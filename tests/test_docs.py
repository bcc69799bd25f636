"""The documentation's code runs, and its tables are true."""

import re

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.losses import BOUNDS, LOSSES
from ddpm_ext.samplers import SAMPLERS, VARIANCES
from ddpm_ext.spacing import spaced_timesteps
from ddpm_ext.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_ext.weightings import WEIGHTINGS


def run(page, folder, monkeypatch):
    """How many blocks of code it has."""
    monkeypatch.chdir(folder)
    pytest.importorskip("matplotlib").use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {"torch": torch, "Philox": Philox, "GaussianDiffusion": GaussianDiffusion}
    names |= {"model": lambda x, t: 0.1 * x, "shape": (2, 1, 8, 8), "gd": GaussianDiffusion(1000)}
    for block in blocks:
        exec(re.sub(r"(p_sample_loop\(.*) shape,", r"\1 shape, progress=False,", block), names)
    return len(blocks)


def test_sampling_code(root, tmp_path, monkeypatch):
    assert run(root / "docs" / "sampling.md", tmp_path, monkeypatch) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "mine.png"}


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
def test_options_code(root, tmp_path, monkeypatch):
    assert run(root / "docs" / "options.md", tmp_path, monkeypatch) == 8


def test_training_code(root, tmp_path, monkeypatch):
    assert run(root / "docs" / "training.md", tmp_path, monkeypatch) == 6


def test_every_loss_and_weighting_is_told(root):
    told = set(re.findall(r'`"(\w+)"`', (root / "docs" / "training.md").read_text()))
    assert {*LOSSES, *BOUNDS, "simple", *WEIGHTINGS, *TIMESTEP_SAMPLERS} <= told


def test_spacings_table(root):
    text = (root / "docs" / "sampling.md").read_text()
    rows = re.findall(r'^\| `"([a-z\d,]+)"` \| ([\d ]+\d)', text, re.MULTILINE)
    assert len(rows) == 6
    for spacing, timesteps in rows:
        steps = None if spacing[-1].isdigit() else 5
        assert spaced_timesteps(1000, steps, spacing).tolist() == [int(t) for t in timesteps.split()]


def test_every_sampler_and_variance_is_told(root):
    names = [
        set(re.findall(r'`"(\w+)"`', (root / "docs" / page).read_text())) for page in ("sampling.md", "options.md")
    ]
    assert set(SAMPLERS) <= names[0]
    assert {name for name in VARIANCES if name.startswith("learned")} <= names[1]
