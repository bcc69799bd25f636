"""torch.set_default_device sets where tensors are made that no device is given for.

The tables stay on the CPU nevertheless, and samples on their device."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Guidance, Philox
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.training import Trainer

CASES = [(sampler, spacing) for sampler in SAMPLERS for spacing in ("linspace", "karras")]
CASES += [("ddim", spacing) for spacing in (*SPACINGS, "ddim5", "3,2") if spacing != "align_your_steps_svd"]
META = torch.device("meta")  # nothing can be computed on meta, so that any use of the default raises


def model(x, t):
    return x * 0.5


def same(ask):
    """What a new diffusion gives does not depend on the default."""
    expected = ask()
    with META:
        found = ask()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sampler, spacing", CASES)
def test_loops(sampler, spacing):
    options = {"sampler": sampler, "spacing": spacing, "record": "last", "progress": False, "device": "cpu"}
    options |= {"steps": None if spacing[-1].isdigit() else 5, "rng": Philox(3)}
    if sampler == "ddim":
        options["guidance"] = Guidance(3.0, unconditional=lambda x, t: 0.1 * x, interval=(10, 90))
    same(lambda: GaussianDiffusion(100).p_sample_loop(model, (2, 1, 4, 4), **options))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "scaled_linear", torch.full((50,), 0.01)], ids=str)
def test_training(schedule):
    x, t = torch.rand(3, 1, 4, 4), torch.tensor([0, 4, 9])
    for options in ({}, {"offset_noise": 0.1, "input_perturbation": 0.1}, {"loss": "vlb"}):
        same(lambda o=options: GaussianDiffusion(50, schedule).train_losses(model, x, t, rng=Philox(1), **o))
    same(lambda: GaussianDiffusion(50, schedule).bits_per_dim(model, x, rng=Philox(1)).total)


def test_trainer(tmp_path):
    """And its pictures and its samples, and a model that is made by its options."""
    pytest.importorskip("diffusers")
    options = {"steps": 2, "batch_size": 4, "timesteps": 20, "checkpoint_every": 1, "log_every": 1}
    options |= {"widths": (8, 8), "attention": (), "sample_every": 2, "sample_steps": 2, "sample_count": 2}
    weights = []
    for device in (torch.device("cpu"), META):
        with device:
            trainer = Trainer(None, None, "digits", tmp_path / device.type, report=lambda _: None, **options)
            trainer.fit()
        weights.append(trainer.state.average.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def makers_without_a_device(tree: ast.AST) -> list[str]:
    """Calls of torch's functions that make a tensor on the default device."""
    makers = {
        *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
        *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
    }
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if ast.unparse(call.func) in {f"torch.{name}" for name in makers}
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]


def test_every_tensor_names_its_device():
    assert makers_without_a_device(ast.parse("torch.zeros(3)")) == ["1: torch.zeros(3)"]
    source = Path(ddpm_ext.__file__).parent
    found = {path.name: makers_without_a_device(ast.parse(path.read_text("utf-8"))) for path in source.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == {}
