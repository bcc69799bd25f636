"""What type checkers say of a user's script, and pyright also of the documentation's code."""

import json
import re
import subprocess
import sys

import pytest
from support.pasted import BLOCK

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
# Without the types of the large libraries, which mypy would read for a minute.
MYPY = """
[mypy]
ignore_missing_imports = true
follow_imports = silent
[mypy-diffusers.*,transformers.*,torch.*,huggingface_hub.*]
follow_imports = skip
"""
# An object of diffusers keeps its type. To mypy, diffusers' names are those of its placeholders without methods.
DIFFUSERS = """
from diffusers import DDIMScheduler
from ddpm_ext import accelerate
scheduler: DDIMScheduler = accelerate(DDIMScheduler())
scheduler.accelerated.seed = 1
scheduler.set_timesteps(5)
scheduler.set_timesteps(5, "cpu", 5)  # wrong
accelerate(scheduler, table="t.json").anything()
"""
# A pipeline's call returns an object or a tuple, whose attributes pyright reports, accelerated or not.
ERROR = re.compile(r"([\w.-]+\.py):(\d+):.* error(?!: Cannot access attribute \"images\" for class \"tuple)")


def wrong(script: str, name: str) -> set[tuple[str, str]]:
    return {(name, str(n)) for n, line in enumerate(script.splitlines(), 1) if line.endswith("# wrong")}


@pytest.mark.slow
def test_mypy(root, tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "torch.pyi").write_text("class Tensor: ...\ndef __getattr__(name): ...\n")  # instead of torch's types
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MYPYPATH", f".:{root}")
    out, err, _ = api.run(["--python-executable", sys.executable, "script.py"])
    assert {*ERROR.findall(out)} == wrong(SCRIPT, "script.py"), out + err


@pytest.mark.slow
def test_pyright(root, tmp_path):
    pytest.importorskip("basedpyright")
    pytest.importorskip("diffusers")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "scheduler.py").write_text(DIFFUSERS)
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        (tmp_path / f"page_{page.stem}.py").write_text("\n".join(BLOCK.findall(page.read_text())))
    # guided-diffusion is no package of an index, and pyright takes what diffusers imports late for private.
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(root)]}
    settings |= dict.fromkeys(("reportMissingImports", "reportPrivateImportUsage"), False)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert {*ERROR.findall(out)} == wrong(SCRIPT, "script.py") | wrong(DIFFUSERS, "scheduler.py"), out
