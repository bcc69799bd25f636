"""Trainer on a module and a dataset: its steps against a plain loop, and the files that it writes."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import trainer_run
from support.command_line import TINY
from support.launches import Operators
from support.trainer_run import Squares, Tiny, make, rows

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.losses.timestep_samplers import Importance
from ddpm_ext.training import Trainer, TrainOptions, checkpoints
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.data import TensorImages, as_images
from ddpm_ext.training.log import QUARTERS
from ddpm_ext.training.step import TrainingStep, part_of


def final(folder):
    """The tensors of the last checkpoint."""
    return checkpoints.load(checkpoints.newest(folder))[0]


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name].double(), other[name].double(), **tolerance) for name in one)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_steps_are_those_of_a_plain_loop(tmp_path, clip):
    """In float64, with the documented loss, weights, noise, average and learning rate."""
    options = {"steps": 12, "warmup": 3, "clip": clip, "ema": 0.8, "lr": 0.01, "weight_decay": 0.1, "seed": 4}
    options |= {"betas": (0.7, 0.95), "adam_eps": 1e-3}
    trainer = make(tmp_path / "run", dropout=0.0, prediction="v", **options)
    batches = StepBatches(as_images(Squares()), trainer.options, 0, 6)
    sampler = trainer.state.timestep_sampler = Importance(torch.linspace(1, 3, 20))
    trainer.fit()
    model, average = Tiny(dropout=0.0).double(), Tiny(dropout=0.0).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1, betas=(0.7, 0.95), eps=1e-3)
    alphas_cumprod, expected = GaussianDiffusion(20).alphas_cumprod, []
    for step in range(12):
        x = batches[step].images.double()
        t, weights = sampler.sample(6, seed=4, iteration=step)
        noise = randn(x.shape, Philox(4), stream=2, draw=step).double()
        a, b = (level.sqrt().view(-1, 1, 1, 1) for level in (alphas_cumprod[t], 1 - alphas_cumprod[t]))
        errors = (model(a * x + b * noise, t) - (a * noise - b * x)).square().mean((1, 2, 3))
        loss = (weights.double() * errors).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([value.grad.flatten() for value in model.parameters()]).norm()
        if clip and norm > clip:
            for value in model.parameters():
                value.grad *= clip / (norm + 1e-6)
        lr = 0.01 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 12))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        decay = min(0.8, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean += (1 - decay) * (value - mean)
        expected.append({"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "lr": lr})
    average.calls.copy_(model.calls)
    found, tolerance = final(tmp_path / "run"), {"rtol": 1e-4, "atol": 1e-6}
    assert close(checkpoints.with_prefix(found, "model."), model.state_dict(), **tolerance)
    assert close(checkpoints.with_prefix(found, "average."), average.state_dict(), **tolerance)
    assert close(trainer_run.weights(tmp_path / "run"), average.state_dict(), **tolerance)
    for row, wanted in zip(rows(tmp_path / "run"), expected, strict=True):
        assert row.pop("images_per_second") > 0
        assert all(row.pop(name, None) is not None for name in QUARTERS)  # test_quarters.py has their values
        assert row == pytest.approx(wanted, rel=1e-4)


def test_a_timestep_sampler_learns_from_losses_without_weights(tmp_path):
    """The weights make up for unequal probabilities, on which a timestep's loss does not depend."""
    seen = []

    class Learning(Importance):
        learns, weighted = True, True

        def sample(self, *arguments, **options):
            t, weights = super().sample(*arguments, **options)
            return t, weights if self.weighted else torch.ones_like(weights)

        def update(self, t, losses, *, local=True):
            seen.append(losses)

    for weighted in (True, False):
        trainer = make(tmp_path / str(weighted), steps=1)
        trainer.state.timestep_sampler = Learning(torch.linspace(1, 3, 20))
        trainer.state.timestep_sampler.weighted = weighted
        trainer.fit()
    assert torch.equal(*seen) and seen[0].min() > 0


def test_float16_skips_a_step_that_overflows(tmp_path):
    model = Tiny(dropout=0.0)
    with torch.no_grad():
        model.out.weight.mul_(10)
    make(tmp_path / "run", model=model, steps=8, autocast="float16").fit()
    found = rows(tmp_path / "run")
    assert not math.isfinite(found[0]["grad_norm"]) and math.isfinite(found[0]["loss"])
    assert math.isfinite(found[-1]["grad_norm"])
    assert checkpoints.load(checkpoints.newest(tmp_path / "run"))[1]["scaler"]["scale"] < 65536
    assert all(value.isfinite().all() for value in final(tmp_path / "run").values())


def test_steps_wait_for_no_device(tmp_path):
    for autocast in ("none", "bfloat16"):
        trainer = make(tmp_path / "run", autocast=autocast, accumulate=2)
        step = TrainingStep(trainer.state, trainer.diffusion, trainer.options, trainer.ranks, trainer.device)
        images = torch.zeros(6, 1, 8, 8)
        step.take(images)
        with Operators() as operators:
            for _ in range(3):
                step.take(images)
            assert not any("::item" in name for name in operators.names) and len(step.log_rows(lambda: None)) == 4
        assert step.log_rows(lambda: None) == []


def test_dropout_is_drawn_anew_for_each_step_and_part(tmp_path):
    """A step that is taken again draws the same."""
    trainer = make(tmp_path / "run", accumulate=2, dropout=0.5)
    step = TrainingStep(trainer.state, trainer.diffusion, trainer.options, trainer.ranks, trainer.device)
    masks = []
    trainer.model.dropout.register_forward_hook(lambda module, given, output: masks.append(output == 0))
    for number in (0, 1, 0):
        trainer.state.step = number
        step.take(torch.zeros(6, 1, 8, 8))
    assert len(masks) == 6 and torch.equal(torch.cat(masks[:2]), torch.cat(masks[4:]))
    assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


@pytest.mark.subprocess
def test_random_transforms_depend_on_the_place_alone():
    """They don't depend on batches, workers, or what was read before; the caller's generators don't change."""
    options, cpu = TrainOptions(data="squares", batch_size=6, seed=3), torch.device("cpu")
    whole = [batch.images for batch in StepBatches(as_images(Squares()), options, 0, 6).iterate(0, 5, cpu)]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert torch.equal(StepBatches(as_images(Squares()), options, 0, 6)[3].images, whole[3])
    parts = [StepBatches(as_images(Squares()), options, *rows)[3].images for rows in ((0, 1), (1, 6))]
    assert torch.equal(torch.cat(parts), whole[3])
    ahead = StepBatches(as_images(Squares()), TrainOptions(data="squares", batch_size=6, seed=3, workers=2), 0, 6)
    assert torch.equal(torch.cat([batch.images for batch in ahead.iterate(1, 5, cpu)]), torch.cat(whole[1:]))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert len(torch.unique(torch.cat(whole).flatten(1), dim=0)) == 30  # all differ: each read draws anew


@given(
    count=st.integers(1, 9),
    batch_size=st.integers(1, 12),
    ranks=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    step=st.integers(0, 20),
    seed=st.integers(0, 2**64 - 1),
)
def test_ranks_and_parts_share_the_batch(count, batch_size, ranks, accumulate, step, seed):
    """In order and evenly, each sample once; an image and its mirroring depend on its place in the batch alone."""
    assume(batch_size >= ranks * accumulate)
    options = TrainOptions(data="tensor", batch_size=batch_size, flip=True, seed=seed)
    images = TensorImages(torch.rand(count, 1, 1, 2))
    whole = StepBatches(images, options, 0, batch_size)[step].images
    rows = [part_of(range(batch_size), rank, ranks) for rank in range(ranks)]
    parts = [part_of(own, part, accumulate) for own in rows for part in range(accumulate)]
    assert [row for part in parts for row in part] == list(range(batch_size))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1 and min(map(len, parts)) >= 1
    split = torch.cat([StepBatches(images, options, own.start, own.stop)[step].images for own in rows])
    assert torch.equal(split, whole)


def test_torchs_default_dtype_changes_no_run(tmp_path):
    options = {"data": trainer_run.IMAGES, "flip": True, "steps": 4}
    model, before = Tiny(), torch.get_default_dtype()
    make(tmp_path / "run", **options).fit()
    torch.set_default_dtype(torch.float64)
    try:
        make(tmp_path / "other", model=model, **options).fit()
    finally:
        torch.set_default_dtype(before)
    trainer_run.assert_same(tmp_path / "run", tmp_path / "other")


def test_grids_are_samples_of_the_averaged_model(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from ddpm_ext import plots

    options = {"sample_every": 8, "sample_steps": 5, "sample_count": 6, "steps": 20, "checkpoint_every": 8}
    trainer = make(tmp_path / "run", **options)
    trainer.fit()
    folder = tmp_path / "run" / "samples"
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000008.png", "step-00000016.png"]
    make(tmp_path / "none", **options | {"sample_every": 0}).fit()
    trainer_run.assert_same(tmp_path / "run", tmp_path / "none")
    average, path = Tiny(), tmp_path / "run" / "checkpoints" / "step-00000016.safetensors"
    average.load_state_dict(checkpoints.with_prefix(checkpoints.load(path)[0], "average."))
    drawn = trainer.diffusion.p_sample_loop(
        average.eval(), (6, 1, 8, 8), sampler="ddim", steps=5, rng=Philox(0), record="last", progress=False
    )
    with image.open(folder / "step-00000016.png") as opened:
        assert np.array_equal(np.asarray(opened), plots.grid(plots.to_uint8(drawn.detach())))


def test_frozen_weights_stay(tmp_path):
    """And the files of a run with a module."""
    model = Tiny()
    model.into.requires_grad_(False)
    before, lines = {name: value.clone() for name, value in model.state_dict().items()}, []
    result = make(tmp_path / "run", model=model, steps=5, report=lines.append, command="by hand").fit()
    files = {".lock", "losses.csv", "losses.png", "model.json", "model.safetensors", "options.json", "training.json"}
    assert {path.name for path in result.folder.iterdir()} == files | {"checkpoints", "scheduler"}
    assert "but no pipeline: the model is no UNet2DModel" in lines[-1]
    assert json.loads((result.folder / "model.json").read_text())["class"] == "Tiny"
    made = json.loads((result.folder / "training.json").read_text())
    assert (made["command"], made["ranks"], made["images"], made["skipped"]) == ("by hand", 1, 11, [])
    found = trainer_run.weights(tmp_path / "run")
    assert torch.equal(found["into.weight"], before["into.weight"])
    assert not torch.equal(found["out.weight"], before["out.weight"])
    make(tmp_path / "run", model=model, steps=5, resume=True).fit()


def test_configuration_of_a_unet(tmp_path):
    pytest.importorskip("diffusers")
    from ddpm_ext.models.folder import load_model

    config = {name: value for name, value in TINY.items() if "channels" not in name and name != "sample_size"}
    config |= {"block_out_channels": [8, 8], "dropout": 0.25}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    options = {"steps": 1, "batch_size": 2, "timesteps": 20, "report": len}
    for number, (model, more) in enumerate(((path, {}), (config, {}), (None, {"model_config": str(path)}))):
        Trainer(model, None, torch.zeros(3, 1, 8, 8), tmp_path / f"{number}", **options, **more).fit()
        loaded = load_model(tmp_path / f"{number}")
        assert (loaded.unet.config.block_out_channels, loaded.unet.config.dropout) == ([8, 8], 0.25)
        assert loaded.shape == (1, 8, 8)
