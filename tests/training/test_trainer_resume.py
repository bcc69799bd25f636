"""A run that is killed and resumed ends with the bits of one that was never stopped, whatever its options."""

import os
import signal

import pytest
import torch
from support import trainer_run

from ddpm_ext.training import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")

VARIANTS = {
    "plain": {},
    "bfloat16": {"autocast": "bfloat16"},
    "float16": {"autocast": "float16"},
    # So few timesteps that their probabilities are unequal before the checkpoint.
    "loss_second_moment": {"timestep_sampler": "loss_second_moment", "timesteps": 3, "beta_schedule": "cosine"},
    "workers": {"workers": 2, "flip": True},
    "learned": {"variance": "learned_range", "beta_schedule": "cosine"},
    "offset": {"offset_noise": 0.1, "input_perturbation": 0.1},
    "scored": {"score_every": 8, "score_count": 12, "sample_steps": 3},  # killed after a score that no checkpoint has
    "no clip": {"clip": 0.0, "loss": "huber", "prediction": "v", "weighting": "min_snr"},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of each variant, killed after 17 of 24 steps, of which a checkpoint has 10."""
    folder = tmp_path_factory.mktemp("killed")
    ended = trainer_run.in_forks(folder, {name: [{**how, "steps": 24, "die_at": 17}] for name, how in VARIANTS.items()})
    assert ended == {name: [-signal.SIGKILL] for name in VARIANTS}
    return {name: folder / name / "run" for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_and_resumed_ends_like_never_stopped(killed, tmp_path, name, caplog):
    folder, straight, lines = killed[name], tmp_path / "straight", []
    assert checkpoints.newest(folder).name == "step-00000010.safetensors"
    # Written every 7 and every 10 steps, and with a score.
    assert len(trainer_run.rows(folder)) == (16 if name == "scored" else 14)
    caplog.set_level("INFO", "ddpm_ext")
    trainer_run.make(folder, resume=True, steps=24, report=lines.append, **VARIANTS[name]).fit()
    for told in (lines, caplog.messages):
        assert sum(line.startswith("resumed at step 10 ") for line in told) == 1
    if name == "loss_second_moment":
        known = trainer_run.make(tmp_path / "known", steps=10, **VARIANTS[name])
        known.fit()
        found = known.state.timestep_sampler.probabilities()
        assert found.max() > 1.01 * found.min()
    trainer_run.make(straight, steps=24, **VARIANTS[name]).fit()
    trainer_run.assert_same(folder, straight)
    last = [checkpoints.load(checkpoints.newest(run)) for run in (folder, straight)]
    assert last[0][1] == last[1][1]
    assert last[0][1]["scaler"].get("_growth_tracker") == (24 if name == "float16" else None)
    trainer_run.assert_same(last[0][0], last[1][0])
    logs = [[str(row | {"images_per_second": 0}) for row in trainer_run.rows(run)] for run in (folder, straight)]
    assert logs[0] == logs[1] and len(logs[0]) == 24
    if name == "scored":
        for file in ("scores.csv", "best/score.json", "best/model.safetensors"):
            assert (folder / file).read_bytes() == (straight / file).read_bytes()


def test_killed_between_a_checkpoint_and_its_samples(tmp_path):
    options = {"steps": 20, "checkpoint_every": 10, "sample_every": 10, "sample_steps": 3, "sample_count": 4}
    trainer_run.make(tmp_path, **options).fit()
    pictures = {path: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    assert len(pictures) == 2
    for stop in (10, 20):
        if stop == 10:
            checkpoints.newest(tmp_path).unlink()
        (tmp_path / "samples" / f"step-{stop:08d}.png").unlink()
        trainer_run.make(tmp_path, resume=True, **options).fit()
        assert {path: path.read_bytes() for path in (tmp_path / "samples").iterdir()} == pictures


def test_state_has_the_strides_of_the_weights(tmp_path):
    """AdamW's fused step assumes it."""

    def trainer(**options):
        model = trainer_run.Tiny(channels=2).to(memory_format=torch.channels_last)
        data = torch.linspace(-1, 1, 3 * 2 * 8 * 8).view(3, 2, 8, 8)
        return trainer_run.make(tmp_path / "run", model=model, data=data, steps=20, **options)

    trainer().fit()
    expected = trainer_run.weights(tmp_path / "run")
    checkpoints.newest(tmp_path / "run").unlink()
    resumed = trainer(resume=True)
    resumed.fit()
    assert not resumed.model.into.weight.is_contiguous()
    trainer_run.assert_same(tmp_path / "run", expected)
    state = resumed.state.optimizer.state[resumed.model.into.weight]
    assert state["exp_avg"].stride() == resumed.model.into.weight.stride()
