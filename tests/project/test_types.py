"""What mypy says of a user's script."""

import re
import sys

import pytest

SCRIPT = """
from numpy import ndarray
from torch import Tensor
from ddpm_ext import GaussianDiffusion, accelerate
from ddpm_ext.integrations import Acceleration
def takes(scheduler: int) -> None: ...
def either(record: str) -> "list[ndarray] | Tensor": return gd.sample(takes, 8, record=record)
gd, shape = GaussianDiffusion(1000), (4, 3, 8, 8)
last: Tensor = gd.sample(takes, 8, record="last", sampler="ddim")
last = gd.p_sample_loop(takes, shape, record="last", steps=5)
listed: list[ndarray] = gd.p_sample_loop(takes, shape, record=[0, 4], steps=5)
listed = gd.sample(takes, 8, record="last")  # wrong
gd.sample(takes, 8, step=5)  # wrong
fast = accelerate(3)
settings: Acceleration = fast.accelerated
last = fast.accelerated  # wrong
takes(fast)
fast.set_timesteps(5)
"""


@pytest.mark.slow
def test_a_script(root, tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "script.py").write_text(SCRIPT)
    # In place of torch's own types, which take mypy half a minute to read.
    (tmp_path / "torch.pyi").write_text("class Tensor: ...\ndef __getattr__(name): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MYPYPATH", f".:{root}")
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    out, err, _ = api.run([*options, "--python-executable", sys.executable, "script.py"])
    wrong = [str(number) for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted(set(re.findall(r"^script.py:(\d+): error", out, re.MULTILINE))) == wrong, out + err
