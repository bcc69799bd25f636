"""The progress bar of a run: it counts the steps, and shows the smoothed loss without a wait of its own."""

import csv

import pytest
import torch
from support import trainer_run
from support.trainer_run import Squares, Tiny

from ddpm_ext.base.ranks import Ranks
from ddpm_ext.training import Trainer, step, trainer
from ddpm_ext.training.progress import Bar, progress_bar

for module in ("tqdm", "safetensors", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture
def shown(monkeypatch):
    """The texts that tqdm's bars got, with the step of the bar."""
    import tqdm

    texts = []

    def note(bar, text, refresh=True):
        texts.append((bar.n, text))

    monkeypatch.setattr(tqdm.tqdm, "set_postfix_str", note)
    return texts


def test_bar_and_lines(tmp_path, capsys, threads):
    threads(1)
    Trainer(Tiny(), None, Squares(), tmp_path / "run", progress=True, **trainer_run.SIZES).fit()
    written = capsys.readouterr()
    assert "60/60" in written.err
    assert ", loss 0." in written.err or ", loss 1." in written.err
    assert sum(line.startswith("step ") for line in written.out.splitlines()) == 9  # every 7, and the last


def texts_of(losses, steps):
    """What the bar shows after each of `steps`: the moving average of the losses up to it."""
    texts = []
    for count in steps:
        weights = [0.98**ago for ago in range(count)]
        mean = sum(weight * loss for weight, loss in zip(weights, reversed(losses[:count]), strict=True)) / sum(weights)
        texts.append(f"loss {mean:.4f}")
    return texts


@pytest.mark.parametrize("at_hand", [True, False])
def test_loss_in_the_bar_is_the_moving_average(tmp_path, shown, threads, monkeypatch, at_hand):
    """From the first step on; where that would wait, when the log and checkpoints read losses, every 7 and 10 steps."""
    threads(1)
    if not at_hand:
        monkeypatch.setattr(trainer, "at_hand", lambda device, ranks: False)
    Trainer(Tiny(), None, Squares(), tmp_path / "run", progress=True, report=len, **trainer_run.SIZES).fit()
    with open(tmp_path / "run" / "losses.csv") as opened:
        losses = [float(row["loss"]) for row in csv.DictReader(opened)]
    steps = range(1, 61) if at_hand else sorted({*range(7, 61, 7), *range(10, 61, 10)})
    assert [text for _, text in shown] == texts_of(losses, steps)
    # A step's own loss stands there when the step is counted.
    assert [counted for counted, _ in shown] == [at - at_hand for at in steps]


def test_losses_are_at_hand_on_the_cpu_of_one_process():
    assert step.at_hand(torch.device("cpu"), Ranks())
    assert not step.at_hand(torch.device("cuda", 0), Ranks())
    assert not step.at_hand(torch.device("cpu"), Ranks(1, 2))


def test_bar_without_tqdm_shows_nothing(shown):
    with progress_bar(5, 0, shown=False) as bar:
        bar.advance()
        bar.show([1.0])
    Bar().show([])
    assert shown == []


def test_bar_waits_for_no_step(tmp_path, monkeypatch, threads):
    """Between two lines of the log no tensor's value is read for it, where that would wait."""
    threads(1)
    monkeypatch.setattr(trainer, "at_hand", lambda device, ranks: False)
    seen = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: seen.append(tensor.dim()) or read(tensor))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: seen.append("item") or read(tensor))
    counts = []
    for progress in (False, True):
        seen.clear()
        made = Trainer(
            Tiny(), None, Squares(), tmp_path / str(progress), progress=progress, report=len, **trainer_run.SIZES
        )
        made.fit()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0
