"""Ctrl-C and SIGTERM: the run writes a checkpoint and says so; a second one ends it at once."""

import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from support import trainer_run
from support.trainer_run import make

from ddpm_ext.training import checkpoints, interruption
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.interruption import noted_signals
from ddpm_ext.training.step import TrainingStep

for module in ("safetensors", "matplotlib"):
    pytest.importorskip(module)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
OPTIONS = {"steps": 20, "checkpoint_every": 50, "log_every": 50}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(autouse=True)
def usual_handlers():
    """Those of a program in the foreground: the tests' own process may run in the background, which ignores SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


def send_at(monkeypatch, step, *numbers):
    """This process gets the signals while the step after so many steps is taken."""
    take = TrainingStep.take

    def taken(self, images, labels):
        for number in numbers if self.state.step == step else ():
            signal.raise_signal(number)
        take(self, images, labels)

    monkeypatch.setattr(TrainingStep, "take", taken)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_first_signal_saves_the_step(tmp_path, monkeypatch, number, raised):
    folder, lines = tmp_path / "run", []
    send_at(monkeypatch, 12, number)
    with pytest.raises(raised) as info:
        make(folder, report=lines.append, **OPTIONS).fit()
    assert raised is KeyboardInterrupt or info.value.code == 143
    path = folder / "checkpoints" / "step-00000013.safetensors"
    assert checkpoints.newest(folder) == path
    assert lines[-1] == f"{path} is written; a resume continues from it"
    assert "interrupted: stopping after step 13; a second signal ends the run at once" in lines
    assert not (folder / "training.json").exists()
    monkeypatch.undo()
    make(folder, resume=True, **OPTIONS).fit()
    make(tmp_path / "straight", **OPTIONS).fit()
    found, expected = (trainer_run.weights(run) for run in (folder, tmp_path / "straight"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.subprocess
def test_workers_that_the_signal_kills_are_no_error(tmp_path, monkeypatch):
    """A signal to the whole process group, as batch systems send it."""
    take = TrainingStep.take

    def kill_all(self, images, labels):
        take(self, images, labels)
        if self.state.step == 12:
            signal.raise_signal(signal.SIGTERM)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(TrainingStep, "take", kill_all)
    with pytest.raises(SystemExit):
        make(tmp_path / "run", workers=2, **OPTIONS).fit()
    assert checkpoints.newest(tmp_path / "run").name == "step-00000012.safetensors"
    assert multiprocessing.active_children() == []
    # Else a worker's death is not noticed any more: torch sets its handler once in a process.
    assert callable(signal.getsignal(signal.SIGCHLD))


def test_signal_while_a_batch_is_awaited_saves_the_step_before(tmp_path, monkeypatch):
    """As after 12 steps, without the batch that would never come."""
    read = StepBatches._read

    def never(self, step):
        if step == 12:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("still waiting")
        return read(self, step)

    monkeypatch.setattr(StepBatches, "_read", never)
    with pytest.raises(SystemExit) as info:
        make(tmp_path / "run", **OPTIONS).fit()
    assert info.value.code == 143
    assert checkpoints.newest(tmp_path / "run").name == "step-00000012.safetensors"
    monkeypatch.undo()
    make(tmp_path / "run", resume=True, **OPTIONS).fit()
    assert len((tmp_path / "run" / "losses.csv").read_text().splitlines()) == 1 + 20


@pytest.mark.parametrize("comes", [True, False])
def test_signal_that_a_worker_got_first(tmp_path, monkeypatch, comes):
    """The worker's death is the first that this process learns of it."""
    read, waited = StepBatches._read, []

    def dies(self, step):
        if step == 12:
            raise ChildProcessError("data: a worker died")
        return read(self, step)

    def sleep(seconds):
        waited.append(seconds)
        if comes:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StepBatches, "_read", dies)
    monkeypatch.setattr(interruption, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(SystemExit if comes else ChildProcessError):
        make(tmp_path / "run", **OPTIONS).fit()
    assert len(waited) == 1
    newest = checkpoints.newest(tmp_path / "run")
    assert newest.name == "step-00000012.safetensors" if comes else newest is None


def test_second_signal_ends_at_once(tmp_path, monkeypatch):
    send_at(monkeypatch, 12, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", **OPTIONS).fit()
    assert checkpoints.newest(tmp_path / "run") is None


def test_signal_in_the_last_step_finishes(tmp_path, monkeypatch):
    send_at(monkeypatch, 19, signal.SIGTERM)
    make(tmp_path / "run", **OPTIONS).fit()
    assert (tmp_path / "run" / "training.json").exists()


def test_handlers_of_others_stay():
    came = []

    def own(number, frame):
        came.append(number)

    signal.signal(signal.SIGTERM, own)
    try:
        with noted_signals() as noted:
            signal.raise_signal(signal.SIGTERM)
            assert (came, noted.number) == ([signal.SIGTERM], 0)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_other_threads_train_without_handlers():
    found = []

    def block():
        with noted_signals() as noted:
            found.append(noted.number)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [0]
