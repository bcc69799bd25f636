"""The documentation's code runs, and its tables are true."""

import re

import pytest
import torch

from ddpm_ext import GaussianDiffusion
from ddpm_ext.spacing import spaced_timesteps


def test_sampling_code(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "sampling.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    names = {"model": lambda x, t: 0.1 * x, "shape": (2, 1, 8, 8), "gd": GaussianDiffusion(1000), "torch": torch}
    for block in blocks:
        exec(block.replace("model, shape,", "model, shape, progress=False,"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "mine.png"}


def test_spacings_table(root):
    text = (root / "docs" / "sampling.md").read_text()
    rows = re.findall(r'^\| `"([a-z\d,]+)"` \| ([\d ]+\d)', text, re.MULTILINE)
    assert len(rows) == 6
    for spacing, timesteps in rows:
        steps = None if spacing[-1].isdigit() else 5
        assert spaced_timesteps(1000, steps, spacing).tolist() == [int(t) for t in timesteps.split()]
