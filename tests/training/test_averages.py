"""Further moving averages of the weights, beside the one that is sampled from, in a run that is made longer."""

import torch
from support.refused import refused
from support.trainer_run import Tiny, assert_same, make

from ddpm_ext import training
from ddpm_ext.training.step import TrainingStep


def test_each_average_has_its_decay(tmp_path, monkeypatch):
    seen, take = [], TrainingStep.take

    def note(self, images, labels):
        take(self, images, labels)
        seen.append({name: value.detach().clone() for name, value in self.state.model.state_dict().items()})

    monkeypatch.setattr(TrainingStep, "take", note)
    folder, decays = tmp_path / "run", (0.3, 0.95)
    make(folder, steps=10, lr_schedule="constant", extra_emas=decays).fit()
    make(folder, steps=20, lr_schedule="constant", extra_emas=decays, resume=True).fit()
    assert len(seen) == 20
    for decay in decays:
        expected = {name: value.double() for name, value in Tiny().state_dict().items()}
        for step, now in enumerate(seen):
            kept = min(decay, (1 + step) / (10 + step))
            expected = {name: kept * value + (1 - kept) * now[name] for name, value in expected.items()}
        found = training.load(folder / f"ema-{decay}", Tiny()).model.state_dict()
        assert found.pop("calls") == 20
        assert all(torch.allclose(value.double(), expected[name], atol=1e-6) for name, value in found.items())
    make(tmp_path / "plain", steps=20, lr_schedule="constant").fit()
    assert_same(tmp_path / "plain", folder)
    refused(ValueError, "change: got lr, expected resume=True beside it", make, folder, change=["lr"])
    refused(ValueError, "change: got seed, expected some of", make, folder, change=["seed"], resume=True)
