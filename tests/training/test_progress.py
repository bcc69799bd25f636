"""The progress bar of a run: it counts the steps, and shows the smoothed loss without a wait of its own."""

import re
import sys

import pytest
import torch
from support.trainer_run import make, rows

from ddpm_ext.base.ranks import Ranks
from ddpm_ext.training import step, trainer

pytest.importorskip("tqdm")


@pytest.fixture
def shown(monkeypatch):
    """The texts that tqdm's bars got, with the step of the bar."""
    import tqdm

    texts = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def note(bar, text, refresh=True):
        texts.append((bar.n, text))

    monkeypatch.setattr(tqdm.tqdm, "set_postfix_str", note)
    return texts


def texts_of(losses, steps):
    """What the bar shows after each of `steps`: the moving average of the losses up to it."""
    texts = []
    for count in steps:
        weights = [0.98**ago for ago in range(count)]
        mean = sum(weight * loss for weight, loss in zip(weights, reversed(losses[:count]), strict=True)) / sum(weights)
        texts.append(f"loss {mean:.4f}")
    return texts


@pytest.mark.parametrize("at_hand", [True, False])
def test_loss_in_the_bar_is_the_moving_average(tmp_path, shown, monkeypatch, at_hand):
    """From the first step on; where that would wait, when the log and checkpoints read losses, every 7 and 10 steps."""
    if not at_hand:
        monkeypatch.setattr(trainer, "at_hand", lambda device, ranks: False)
    make(tmp_path / "run", progress=True, steps=30).fit()
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    steps = range(1, 31) if at_hand else sorted({*range(7, 31, 7), *range(10, 31, 10)})
    assert [text for _, text in shown] == texts_of(losses, steps)
    # A step's own loss stands there when the step is counted.
    assert [counted for counted, _ in shown] == [at - at_hand for at in steps]
    assert step.at_hand(torch.device("cpu"), Ranks()) and not step.at_hand(torch.device("cuda", 0), Ranks())
    assert not step.at_hand(torch.device("cpu"), Ranks(1, 2))


def test_bar_waits_for_no_step(tmp_path, monkeypatch):
    """Between two lines of the log no tensor's value is read for it, where that would wait."""
    monkeypatch.setattr(trainer, "at_hand", lambda device, ranks: False)
    seen, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: seen.append(tensor.dim()) or read(tensor))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: seen.append("item") or read(tensor))
    counts = []
    for progress in (False, True):
        seen.clear()
        make(tmp_path / str(progress), progress=progress, steps=20).fit()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_lines_of_the_log_say_what_losses_csv_says(tmp_path):
    """The mean loss since the last line, and the learning rate of the step."""
    lines = []
    options = {"steps": 12, "log_every": 4, "lr": 0.01, "lr_schedule": "linear", "warmup": 6}
    make(tmp_path / "run", report=lines.append, **options).fit()
    shown = [re.match(r"step +(\d+)/12  loss ([\d.]+) \(.*\)  lr (\S+)  ", line) for line in lines]
    shown = [match.groups() for match in shown if match]
    assert [int(step) for step, _, _ in shown] == [4, 8, 12]
    logged = rows(tmp_path / "run")
    for at, loss, lr in shown:
        part = logged[int(at) - 4 : int(at)]
        assert float(lr) == pytest.approx(part[-1]["lr"], rel=1e-2)
        assert float(loss) == pytest.approx(sum(row["loss"] for row in part) / 4, abs=1e-4)
