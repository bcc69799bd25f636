"""Gradient checkpointing: the same weights, with fewer activations kept; an error for a module that has none."""

from dataclasses import replace

import pytest
import torch
from support.trainer_run import Tiny, make

from ddpm_ext.training import Trainer, TrainOptions
from ddpm_ext.training.step import TrainingStep

for module in ("diffusers", "safetensors", "matplotlib"):
    pytest.importorskip(module)

SMALL = {"batch_size": 4, "widths": (8, 8), "layers": 2, "attention": (1,), "groups": 4, "timesteps": 20}
SMALL |= {"steps": 6, "warmup": 2, "dropout": 0.3, "device": "cpu"}


def trainer(out, **options):
    data = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8)
    return Trainer(None, None, data, out, report=len, **SMALL | options)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_weights_are_the_same_also_with_dropout(tmp_path, threads):
    threads(1)
    for name, options in (("plain", {}), ("kept", {"gradient_checkpointing": True})):
        trainer(tmp_path / name, **options).fit()
    found, expected = weights(tmp_path / "kept"), weights(tmp_path / "plain")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # It may be switched on for a resume: it changes nothing but the memory.
    trainer(tmp_path / "plain", gradient_checkpointing=True, resume=True, steps=8).fit()


def test_fewer_activations_are_kept(tmp_path, threads):
    threads(1)
    counts = []
    for enabled in (False, True):
        made = trainer(tmp_path / "run", gradient_checkpointing=enabled)
        assert made.model.is_gradient_checkpointing == enabled
        step = TrainingStep(made.state, made.diffusion, made.options, made.ranks, made.device)
        kept = []

        def pack(value, kept=kept):
            kept.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            losses = made.diffusion.train_losses(made.model, torch.zeros(4, 1, 8, 8), 3)
        forward = sum(kept)
        losses.backward()
        step.take(torch.zeros(4, 1, 8, 8))
        counts.append(forward)
    assert counts[1] < 0.5 * counts[0]


def test_refusals(tmp_path):
    message = (
        "gradient_checkpointing: a Tiny has no method enable_gradient_checkpointing, expected a model of diffusers"
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="graph: got gradient_checkpointing beside it"):
        replace(TrainOptions(), graph=True, gradient_checkpointing=True)

    class Unable(Tiny):
        def enable_gradient_checkpointing(self):
            raise ValueError("Unable does not support it")

    with pytest.raises(ValueError, match=r"gradient_checkpointing: Unable fails \(Unable does not support it\)"):
        make(tmp_path / "run", model=Unable(), gradient_checkpointing=True)


def test_module_of_ones_own_has_its_method_called(tmp_path, threads):
    threads(1)

    class Able(Tiny):
        called = False

        def enable_gradient_checkpointing(self):
            self.called = True

    assert make(tmp_path / "run", model=Able(), gradient_checkpointing=True).model.called
    assert not make(tmp_path / "run", model=Able()).model.called
