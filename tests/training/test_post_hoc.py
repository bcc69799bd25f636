"""Averages of any length after training, beside the direct average of the weights that were recorded at each step."""

import json

import numpy as np
import pytest
import torch
from support.command_line import call
from support.trainer_run import Tiny, make, make_unet, weights

from ddpm_ext.training import load, post_hoc_average, power_average
from ddpm_ext.training.step import TrainingStep

STEPS, EVERY = 40, 8


def test_of_every_length(tmp_path, monkeypatch):
    """Of a run that is resumed between two snapshots. The bound is Cauchy-Schwarz's, by the distance that is told."""
    seen, take = [], TrainingStep.take

    def note(self, images, labels):
        take(self, images, labels)
        seen.append(torch.nn.utils.parameters_to_vector(self.state.model.parameters()).detach().double())

    monkeypatch.setattr(TrainingStep, "take", note)
    for steps in (STEPS - 13, STEPS):
        make(tmp_path, steps=steps, snapshot_every=EVERY, lr=0.02, resume=steps == STEPS).fit()
    stray = tmp_path / "snapshots" / f"step-{STEPS + 1:08d}-length-0.05.safetensors"  # a killed run's, of a later step
    stray.write_bytes(b"")
    make(tmp_path, steps=STEPS, snapshot_every=EVERY, lr=0.02, resume=True).fit()
    assert not stray.exists() and len(seen) == STEPS
    recorded, times = torch.stack(seen), np.linspace(0, 1, 200_001)[1:]
    for length in (0.05, 0.07, 0.1, 0.15):
        gamma = power_average.exponent(length)
        density = times**gamma / (times**gamma).sum()
        assert np.sqrt(density @ times**2 - (density @ times) ** 2) == pytest.approx(length, rel=1e-4)
        powers = torch.arange(STEPS + 1, dtype=torch.float64) ** (gamma + 1) / STEPS ** (gamma + 1)
        direct = powers.diff() @ recorded
        found = post_hoc_average(tmp_path, length, Tiny())
        assert (found.step, found.snapshots) == (STEPS, 2 * (STEPS // EVERY + 1))
        assert found.distance < (1e-6 if length in power_average.LENGTHS else 0.1)
        norm = (gamma + 1) / (2 * gamma + 1) ** 0.5 / STEPS**0.5
        spread = (recorded - recorded.mean(0)).norm(dim=0)
        off = torch.nn.utils.parameters_to_vector(found.trained.model.parameters()) - direct
        assert bool((off.abs() <= found.distance * norm * spread + 1e-6).all()) and float(spread.min()) > 0.01
    assert found.trained.model.calls == load(tmp_path, Tiny()).model.calls == STEPS


def test_command(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    make_unet(run, snapshot_every=1).fit()
    assert call("average", run, "--length", 0.15) == call("average", run, "--length", 0.15) == 0
    assert capsys.readouterr().out.startswith(f"{run}/average-0.15: average of length 0.15 at step 2, from 4 snapshots")
    assert json.loads((run / "average-0.15" / "average.json").read_text())["length"] == 0.15
    expected = post_hoc_average(run, 0.15).trained.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights(run / "average-0.15").items())
    make(other, steps=1).fit()
    for arguments, message in (
        ((run, "--length", 0.3), "length: got 0.3, expected a number above 0 and up to 0.288"),
        ((run, "--length", 0.1, "--out", other), f"out: {other} holds something else"),
        ((other, "--length", 0.1), "other is a run of a Tiny, expected --network support.trainer_run:Tiny"),
        ((other, "--length", 0.1, "--network", "support.trainer_run:Tiny"), "other has no snapshots, expected a run"),
    ):
        assert call("average", *arguments) == 2
        assert message in capsys.readouterr().err
