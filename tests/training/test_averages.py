"""The averages of a run, and those of other lengths that are made of its snapshots, beside the recorded weights."""

import numpy as np
import pytest
import torch
from support import trainer_run
from support.command_line import call, check_refused
from support.refused import refused
from support.trainer_run import Tiny, make, make_unet

from ddpm_ext.training import load, network, post_hoc_average, power_average
from ddpm_ext.training.step import TrainingStep

STEPS, OPTIONS = 20, {"lr_schedule": "constant", "extra_emas": (0.3, 0.95), "snapshot_every": 4}


def flat(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()


def test_each_average_has_its_decay_or_length(tmp_path, monkeypatch):
    """Those beside the one that is sampled from; and a longer run with a constant rate is one that was longer."""
    seen, take = [], TrainingStep.take

    def note(self, images, labels):
        take(self, images, labels)
        seen.append(flat(self.state.model))

    monkeypatch.setattr(TrainingStep, "take", note)
    folder, later = tmp_path / "run", tmp_path / "run" / "snapshots" / f"step-{STEPS + 1:08d}-length-0.05.safetensors"
    make(folder, steps=10, **OPTIONS).fit()
    later.write_bytes(b"of a run that was killed")
    make(folder, steps=STEPS, **OPTIONS, resume=True).fit()
    assert len(seen) == STEPS and not later.exists()
    for decay in OPTIONS["extra_emas"]:
        expected = flat(Tiny())
        for step, now in enumerate(seen):
            expected += (1 - min(decay, (1 + step) / (10 + step))) * (now - expected)
        found = load(folder / f"ema-{decay}", Tiny()).model
        assert found.calls == STEPS and torch.allclose(flat(found), expected, atol=1e-6)
    recorded, times = torch.stack(seen), np.linspace(0, 1, 100_001)[1:]
    for length in (0.05, 0.07, 0.1, 0.15):
        gamma = power_average.exponent(length)
        density = times**gamma / (times**gamma).sum()
        assert np.sqrt(density @ times**2 - (density @ times) ** 2) == pytest.approx(length, rel=1e-3)
        direct = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS).pow(gamma + 1).diff() @ recorded
        average = post_hoc_average(folder, length, Tiny())
        assert (average.step, average.snapshots, average.trained.model.calls) == (STEPS, 12, STEPS)
        assert average.distance < (1e-6 if length in power_average.LENGTHS else 0.1)
        # Cauchy and Schwarz's bound, by the distance that is told.
        most = average.distance * (gamma + 1) / ((2 * gamma + 1) * STEPS) ** 0.5 * recorded.std(0) * STEPS**0.5
        off = (flat(average.trained.model) - direct).abs()
        assert bool((off <= most + 1e-6).all()) and (direct - recorded[-1]).abs().max() > 1e-4
    make(tmp_path / "plain", steps=STEPS, lr_schedule="constant").fit()
    trainer_run.assert_same(tmp_path / "plain", folder)
    refused(ValueError, "change: got lr, expected resume=True", make, folder, change=["lr"])
    refused(ValueError, "change: got seed, expected some of", make, folder, change=["seed"], resume=True)


def test_command(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    make_unet(run, snapshot_every=1).fit()
    assert call("average", run, "--length", 0.15) == call("average", run, "--length", 0.15) == 0
    assert capsys.readouterr().out.startswith(f"{run}/average-0.15: average of length 0.15 at step 2, from 4 snapshots")
    expected = post_hoc_average(run, 0.15).trained.model.state_dict()
    trainer_run.assert_same(run / "average-0.15", dict(expected))
    make(other, steps=1).fit()
    for arguments, message in (
        ((run, "--length", 0.3), "length: got 0.3, expected a number above 0 and up to 0.288"),
        ((run, "--length", 0.1, "--out", other), f"out: {other} holds something else"),
        ((other, "--length", 0.1), "other is a run of a Tiny, expected --network support.trainer_run:Tiny"),
        ((other, "--length", 0.1, "--network", "support.trainer_run:Tiny"), "other has no snapshots, expected a run"),
    ):
        check_refused(capsys, message, "average", *arguments)


def test_command_that_was_killed_or_that_failed_is_run_again(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    make_unet(run, snapshot_every=1).fit()

    def full(*_, **__):
        raise OSError("No space left on device")

    folder = run / "average-0.15"
    leftovers = [folder / ".average.0a1b2c3d.json", folder / "unet" / ".config.0a1b2c3d.json"]  # of a killed process
    folder.mkdir()
    leftovers[0].write_bytes(b"half")
    capsys.readouterr()
    with monkeypatch.context() as disk:
        disk.setattr(network, "save_model", full)
        check_refused(capsys, "No space left on device", "average", run, "--length", 0.15)
    (folder / "unet").mkdir()
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    assert call("average", run, "--length", 0.15) == 0
    trainer_run.assert_same(folder, dict(post_hoc_average(run, 0.15).trained.model.state_dict()))
    assert not any(leftover.exists() for leftover in leftovers)
