"""The code in the documentation runs, and its tables are right."""

import re

import pytest
import torch
from support.eager_tutorial import GaussianDiffusion as EagerTutorial

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.cli.arguments import SPACING_NAMES
from ddpm_ext.integrations.k_diffusion import NAMES
from ddpm_ext.losses.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_ext.models.folder import load_model
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS, spaced_timesteps
from ddpm_ext.tables.variances import VARIANCES
from ddpm_ext.tables.weightings import WEIGHTINGS


def run(page, folder, monkeypatch):
    """Runs the blocks of code on a page, and returns their number."""
    monkeypatch.chdir(folder)
    pytest.importorskip("matplotlib").use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {"torch": torch, "Philox": Philox, "GaussianDiffusion": GaussianDiffusion}
    names |= {"model": lambda x, t: 0.1 * x, "shape": (2, 1, 8, 8), "gd": GaussianDiffusion(1000)}
    for block in blocks:
        exec(re.sub(r"(p_sample_loop\(.*) shape,", r"\1 shape, progress=False,", block), names)
    return len(blocks)


def test_sampling_code(root, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    assert run(root / "docs" / "sampling.md", tmp_path, monkeypatch) == 13
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "mine.png"}


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
def test_options_code(root, tmp_path, monkeypatch):
    assert run(root / "docs" / "options.md", tmp_path, monkeypatch) == 9


def test_training_code(root, tmp_path, monkeypatch):
    assert run(root / "docs" / "training.md", tmp_path, monkeypatch) == 7


def test_reinforcement_code(root, tmp_path, monkeypatch):
    assert run(root / "docs" / "reinforcement.md", tmp_path, monkeypatch) == 1


def test_every_loss_and_weighting_is_documented(root):
    told = set(re.findall(r'`"(\w+)"`', (root / "docs" / "training.md").read_text()))
    assert {*LOSSES, *BOUNDS, "simple", *WEIGHTINGS, *TIMESTEP_SAMPLERS} <= told


def test_spacings_table(root):
    text = (root / "docs" / "sampling.md").read_text()
    rows = re.findall(r'^\| `"([a-z\d,]+)"` \| ([\d ]+\d)', text, re.MULTILINE)
    assert len(rows) == 8
    for spacing, timesteps in rows:
        steps = None if spacing[-1].isdigit() else 5
        assert spaced_timesteps(1000, steps, spacing).tolist() == [int(t) for t in timesteps.split()]


def test_every_spacing_is_documented(root):
    text = (root / "docs" / "sampling.md").read_text()
    table = text[text.index("| `spacing=`") :].partition("\n\n")[0]
    told = set(re.findall(r'`"([\w,]+)"`', table))
    assert told == {*SPACINGS, "ddim5", "2,3"}
    assert all(name in SPACING_NAMES.split("; ")[0].split(", ") for name in SPACINGS)


def test_every_sampler_and_variance_is_documented(root):
    names = [
        set(re.findall(r'`"(\w+)"`', (root / "docs" / page).read_text())) for page in ("sampling.md", "options.md")
    ]
    assert set(SAMPLERS) <= names[0]
    assert {name for name in VARIANCES if name.startswith("learned")} <= names[1]


def test_paths_that_the_pages_name_exist(root):
    """Those that are no links, which tests/project/test_reference_pages.py follows. NAME stands for a new file."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", root / "mkdocs.yml", *(root / "docs").glob("*.md")]
    pages.append(root / "ddpm_ext" / "integrations" / "ADDING.md")
    named = re.compile(r"(?<![\w/.])((?:benchmarks|csrc|ddpm_ext|docs|examples|tests)/[\w./-]*\w)")
    found = {(path, page.name) for page in pages for path in named.findall(page.read_text()) if "NAME" not in path}
    assert len(found) > 60
    assert sorted((path, page) for path, page in found if not (root / path).exists()) == []


def of_diffusers(folder):
    diffusers = pytest.importorskip("diffusers")
    digits = load_model("digits")
    diffusers.DDPMPipeline(digits.unet, diffusers.DDPMScheduler(1000)).save_pretrained(folder)
    return {"folder": folder}


class Net(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x, t):
        return self.net(x)


def of_guided_diffusion(_):
    peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
    options = {"betas": GaussianDiffusion(50).betas.numpy(), "model_mean_type": peer.ModelMeanType.EPSILON}
    options |= {"model_var_type": peer.ModelVarType.FIXED_SMALL, "loss_type": peer.LossType.MSE}
    return {"diffusion": peer.GaussianDiffusion(**options), "model": Net(3)}


def of_denoising_diffusion_pytorch(_):
    peer = pytest.importorskip("denoising_diffusion_pytorch")
    return {"diffusion": peer.GaussianDiffusion(peer.Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=5)}


def of_the_tutorial(_):
    return {"gaussian_diffusion": EagerTutorial(50), "images": torch.zeros(2, 1, 8, 8), "model": Net(1)}


@pytest.mark.parametrize(
    "heading, prepare",
    [
        ("the tutorial", of_the_tutorial),
        ("diffusers", of_diffusers),
        ("guided-diffusion and improved-diffusion", of_guided_diffusion),
        ("denoising-diffusion-pytorch", of_denoising_diffusion_pytorch),
    ],
)
def test_migration_code(root, tmp_path, heading, prepare):
    sections = re.split(r"^## From ", (root / "docs" / "migrate.md").read_text(), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"{heading}\n"))
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"t": torch.tensor([1, 0]), "images": torch.zeros(2, 3, 8, 8), **prepare(tmp_path)}
    exec(block, names)
    made = next(names[name] for name in ("pipeline", "diffusion", "gaussian_diffusion") if name in names)
    assert not getattr(made, "scheduler", made).accelerated.fallbacks


def test_migration_code_of_k_diffusion(root):
    section = (root / "docs" / "migrate.md").read_text().partition("## From k-diffusion")[2]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"x": torch.randn(2, 3, 4, 4), "sigmas": torch.tensor([9.0, 3.0, 1.0, 0.0]), "cond": 0.1}
    exec(block, names | {"denoiser": lambda x, sigma, cond: cond * x})
    named = re.findall(r"`(\w+)`", section.partition("among them")[2].partition("Any function")[0])
    assert len(named) == 10 and set(named) <= set(NAMES)


def test_every_promise_has_a_test(root):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (root / "docs" / "guarantees.md").read_text())
    assert len(named) > 20
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (root / path).read_text()]
    assert not missing
