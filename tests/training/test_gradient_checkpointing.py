"""Gradient checkpointing: fewer activations are kept; an error for a module that has none.

test_every_option.py compares the weights.
"""

import pytest
import torch
from support.trainer_run import Tiny, make, make_unet

from ddpm_ext.training.step import TrainingStep

pytest.importorskip("diffusers")

SMALL = {"widths": (8, 8), "layers": 2, "attention": (1,), "steps": 3, "warmup": 2, "dropout": 0.3}


def test_fewer_activations_are_kept(tmp_path):
    counts = []
    for enabled in (False, True):
        made = make_unet(tmp_path / "run", gradient_checkpointing=enabled, **SMALL)
        assert made.model.is_gradient_checkpointing == enabled
        step, kept = TrainingStep(made.state, made.diffusion, made.options, made.ranks, made.device), []

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
    message = "a Tiny has no method enable_gradient_checkpointing, expected a model of diffusers"
    with pytest.raises(ValueError, match=f"gradient_checkpointing: {message}"):
        make(tmp_path / "run", gradient_checkpointing=True)

    class Unable(Tiny):
        def enable_gradient_checkpointing(self):
            raise ValueError("Unable does not support it")

    with pytest.raises(ValueError, match=r"gradient_checkpointing: Unable fails \(Unable does not support it\)"):
        make(tmp_path / "run", model=Unable(), gradient_checkpointing=True)
