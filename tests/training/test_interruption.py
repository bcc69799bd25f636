"""Ctrl-C, SIGTERM and exceptions: the run writes a checkpoint and says so; a second signal ends it at once."""

import itertools
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support import trainer_run
from support.refused import refused
from support.trainer_run import make

from ddpm_ext import GaussianDiffusion
from ddpm_ext.training import checkpoints, interruption, log, outputs
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.interruption import noted_signals
from ddpm_ext.training.score import Scorer
from ddpm_ext.training.state import TrainState
from ddpm_ext.training.step import TrainingStep

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
OPTIONS = {"steps": 20, "checkpoint_every": 50, "log_every": 50}


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


def at(monkeypatch, step, act, owner=TrainingStep, name="take"):
    """Calls act() before a method when so many steps have been taken."""
    before = getattr(owner, name)

    def method(self, *arguments):
        if (self.state.step if owner is TrainingStep else self.step if owner is TrainState else arguments[0]) == step:
            act()
        return before(self, *arguments)

    monkeypatch.setattr(owner, name, method)


TRACKER = Mock()
ENDS = {  # by a call of what, and after how many of them
    "data": (StepBatches, "_read", 12),
    "model": (GaussianDiffusion, "train_losses", 13),  # after that by which it is tried out
    "line of the log": (log, "progress_line", 1),
    "score": (Scorer, "score", 0),
    "grid": (outputs, "save_grid", 0),
    "tracker": (TRACKER, "numbers", 1),
}


@pytest.mark.parametrize("what", ENDS)
def test_an_exception_ends_a_run_that_is_saved_first(tmp_path, monkeypatch, what):
    folder, lines, calls = tmp_path / "run", [], itertools.count()
    options = {"steps": 20, "log_every": 6, "checkpoint_every": 50, "sample_steps": 2, "score_count": 4}

    def fails(*arguments, **keywords):
        if next(calls) == after:
            raise OSError("lost")
        return before(*arguments, **keywords)

    owner, name, after = ENDS[what]
    before = getattr(owner, name)
    monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr(outputs, "trackers_of", lambda *_: [TRACKER])
    options |= {"score": {"score_every": 12}, "grid": {"sample_every": 12}}.get(what, {})
    refused(OSError, "^lost$", make(folder, report=lines.append, **options).fit)
    path = folder / "checkpoints" / "step-00000012.safetensors"
    assert checkpoints.newest(folder) == path and lines[-1] == f"{path} is written; a resume continues from it"
    assert [row["step"] for row in trainer_run.rows(folder)] == [*range(1, 13)]
    monkeypatch.undo()
    make(folder, resume=True, **options).fit()
    make(tmp_path / "straight", **options).fit()
    trainer_run.assert_same(folder, tmp_path / "straight")
    assert len(trainer_run.rows(folder)) == 20


def test_an_exception_in_the_middle_of_a_step_saves_nothing(tmp_path, monkeypatch):
    """Nor does one after which the disk is full; what ended the run is raised in any case."""
    lines, update = [], TrainState.update_averages
    at(monkeypatch, 12, Mock(side_effect=KeyError("first")), TrainState, "update_averages")
    refused(KeyError, "first", make(tmp_path / "run", report=lines.append, **OPTIONS).fit)
    monkeypatch.setattr(TrainState, "update_averages", update)
    at(monkeypatch, 12, Mock(side_effect=KeyError("first")))
    monkeypatch.setattr(checkpoints, "save", Mock(side_effect=OSError("full")))
    refused(KeyError, "first", make(tmp_path / "run", report=lines.append, **OPTIONS).fit)
    reasons = ("step 13 failed when it had changed the model", "full")
    assert lines[1::2] == [f"no checkpoint of step 12 could be written: {reason}" for reason in reasons]
    assert checkpoints.newest(tmp_path / "run") is None


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_first_signal_saves_the_step(tmp_path, monkeypatch, number, raised):
    folder, lines = tmp_path / "run", []
    at(monkeypatch, 12, lambda: signal.raise_signal(number))
    with pytest.raises(raised) as info:
        make(folder, report=lines.append, **OPTIONS).fit()
    assert raised is KeyboardInterrupt or info.value.code == 143
    path = folder / "checkpoints" / "step-00000013.safetensors"
    assert checkpoints.newest(folder) == path and lines[-1] == f"{path} is written; a resume continues from it"
    assert "interrupted: stopping after step 13; a second signal ends the run at once" in lines
    assert not (folder / "training.json").exists()
    monkeypatch.undo()
    make(folder, resume=True, **OPTIONS).fit()
    make(tmp_path / "straight", **OPTIONS).fit()
    trainer_run.assert_same(folder, tmp_path / "straight")


@pytest.mark.subprocess
def test_workers_that_the_signal_kills_are_no_error(tmp_path, monkeypatch):
    """A signal to the whole process group, as batch systems send it."""

    def kill_all():
        signal.raise_signal(signal.SIGTERM)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    at(monkeypatch, 12, kill_all)
    with pytest.raises(SystemExit):
        make(tmp_path / "run", workers=2, **OPTIONS).fit()
    assert checkpoints.newest(tmp_path / "run").name == "step-00000013.safetensors"
    assert multiprocessing.active_children() == []
    # Else a worker's death is not noticed any more: torch sets its handler once in a process.
    assert callable(signal.getsignal(signal.SIGCHLD))


def test_signal_while_a_batch_is_awaited_saves_the_step_before(tmp_path, monkeypatch):
    """As after 12 steps, without the batch that would never come."""

    def never():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("still waiting")

    at(monkeypatch, 12, never, StepBatches, "_read")
    with pytest.raises(SystemExit) as info:
        make(tmp_path / "run", **OPTIONS).fit()
    assert info.value.code == 143 and checkpoints.newest(tmp_path / "run").name == "step-00000012.safetensors"
    monkeypatch.undo()
    make(tmp_path / "run", resume=True, **OPTIONS).fit()
    assert len(trainer_run.rows(tmp_path / "run")) == 20


@pytest.mark.parametrize("comes", [True, False])
def test_signal_that_a_worker_got_first(tmp_path, monkeypatch, comes):
    """The worker's death is the first that this process learns of it."""
    waited = []

    def dies():
        raise ChildProcessError("data: a worker died")

    def sleep(seconds):
        waited.append(seconds)
        if comes:
            signal.raise_signal(signal.SIGTERM)

    at(monkeypatch, 12, dies, StepBatches, "_read")
    monkeypatch.setattr(interruption, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(SystemExit if comes else ChildProcessError):
        make(tmp_path / "run", **OPTIONS).fit()
    assert len(waited) == 1
    assert checkpoints.newest(tmp_path / "run").name == "step-00000012.safetensors"


def test_second_signal_ends_at_once(tmp_path, monkeypatch):
    """One that comes in the last step changes nothing."""
    at(monkeypatch, 12, lambda: [signal.raise_signal(number) for number in (signal.SIGTERM, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", **OPTIONS).fit()
    assert checkpoints.newest(tmp_path / "run") is None
    monkeypatch.undo()
    at(monkeypatch, 19, lambda: signal.raise_signal(signal.SIGTERM))
    make(tmp_path / "run", **OPTIONS).fit()
    assert (tmp_path / "run" / "training.json").exists()


def test_handlers_of_others_stay_and_other_threads_have_none():
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with noted_signals() as noted:
            signal.raise_signal(signal.SIGTERM)
            assert (came, noted.number) == ([signal.SIGTERM], 0)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def block():
        with noted_signals() as noted:
            came.append(noted.number)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(block).result()
    assert came == [signal.SIGTERM, 0]
