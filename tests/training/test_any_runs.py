"""Runs in one folder, drawn one by one: each goes on where the last one was killed, failed, was interrupted or ended.

The last one leaves what one run in a new folder leaves, whose steps nobody stopped.
"""

import json
import os
import signal
from contextlib import contextmanager

import pytest
from support import trainer_run
from support.choices import for_many
from support.refused import refused
from support.trainer_run import make, rows

from ddpm_ext.training import checkpoints
from ddpm_ext.training.step import TrainingStep

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
# With a constant learning rate, the steps of a longer run begin with those of a shorter one.
ALWAYS = {"lr_schedule": "constant", "warmup": 3, "keep": 2}
DRAWN = {"sample_steps": 2, "sample_count": 2}
VARIANTS = {
    "plain": {"checkpoint_every": 3},
    "pictures": {"checkpoint_every": 2, "sample_every": 2, "extra_emas": (0.5,), **DRAWN},
    # Both also end with the last step, so that the number of steps stays the same.
    "scores": {"checkpoint_every": 3, "score_every": 3, "score_count": 2, "snapshot_every": 2, **DRAWN},
}
STEPS = 9


class Killed(BaseException):
    """Ends a run; `except Exception` does not see it."""


def kill():
    raise Killed


def fail():
    raise OSError("lost")


ENDS = {
    "killed": (kill, Killed),
    "failed": (fail, OSError),
    "interrupted": (lambda: signal.raise_signal(signal.SIGTERM), SystemExit),
}


@contextmanager
def before_step(number, act):
    """Calls act() before step `number` is taken, and has the usual handler of signals."""
    take, handler = TrainingStep.take, signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def method(self, *arguments):
        if self.state.step == number:
            act()
        return take(self, *arguments)

    TrainingStep.take = method
    try:
        yield
    finally:
        TrainingStep.take = take
        signal.signal(signal.SIGTERM, handler)


class Folder:
    """A run's folder. newest: the step of the newest checkpoint, 0 without one. steps: the options' number of steps."""

    def __init__(self, path, variant):
        self.path, self.options, self.newest, self.steps = path, ALWAYS | VARIANTS[variant], 0, 0

    def fit(self, **how):
        make(self.path, steps=self.steps, **{**self.options, **how}).fit()

    def checkpoints(self):
        return sorted(self.path.glob("checkpoints/step-*.safetensors"))

    def everything(self):
        files = {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}
        return {path: content for path, content in files.items() if path.name != ".lock"}


def do_run(folder, choose, straight):
    steps = STEPS if "score_every" in folder.options else choose.integer(max(folder.steps, 1), STEPS, "steps")
    exists, folder.steps = folder.steps > 0, steps
    end = choose.one_of([*ENDS, "none"], "end") if folder.newest < steps else "none"
    number = choose.integer(folder.newest, steps - 1, "before step") if end != "none" else -1
    if end == "interrupted" and number == steps - 1:
        end = "none"  # the last step is finished, and the run with it
    act, error = ENDS.get(end, (lambda: None, ()))
    every = folder.options["checkpoint_every"]
    saved = {"killed": number // every * every, "failed": number, "interrupted": number + 1, "none": steps}[end]
    before = folder.everything() if folder.newest == steps else None
    try:
        with before_step(number, act):
            folder.fit(resume=exists)
    except error:
        assert end != "none"
    else:
        assert end == "none"
        check_ended(folder, straight(steps))
        assert before in (None, folder.everything())  # a resume of a run that has ended changes nothing
    folder.newest = max(folder.newest, saved)
    readable = checkpoints.latest(folder.path, str) if folder.checkpoints() else None
    assert (readable[1]["step"] if readable else 0) == folder.newest
    check_log(folder, straight(steps))


def do_lose_the_newest_checkpoint(folder, choose, straight):
    """It is removed, or cut short while an earlier one is there."""
    found = [path for path in folder.checkpoints() if int(path.stem[5:]) <= folder.newest]  # not those cut before
    if found:
        if len(found) > 1 and choose.one_of([True, False], "cut"):
            found[-1].write_bytes(found[-1].read_bytes()[:-1])
        else:
            # Without a readable one, a checkpoint that was cut before would stop the run.
            for path in found[-1:] if len(found) > 1 else folder.checkpoints():
                path.unlink()
        folder.newest = int(found[-2].stem[5:]) if len(found) > 1 else 0


def do_start_that_is_refused(folder, choose, straight):
    """A run that does not resume, or that has another seed: the folder keeps its files."""
    before, other_seed = folder.everything(), choose.one_of([True, False], "other seed")
    if other_seed and folder.steps:
        refused(ValueError, "seed", folder.fit, resume=True, seed=1)
    elif folder.newest:
        refused(ValueError, "holds a run already", folder.fit)
    assert folder.everything() == before


def check_log(folder, straight):
    """The log has the steps of the newest checkpoint, or more, with the numbers of a run that nobody stopped."""
    found, expected = ([row | {"images_per_second": 0} for row in rows(path)] for path in (folder.path, straight))
    assert len(found) >= folder.newest and list(map(str, found)) == list(map(str, expected[: len(found)]))


def check_ended(folder, straight):
    """All files are those of a run that nobody stopped, but for the times and folders that they name."""
    found, expected = (
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.parent.name != "checkpoints"}
        for run in (folder.path, straight)
    )
    assert found == expected
    for name in found - {"losses.csv", "training.json", "options.json", ".lock"}:
        assert (folder.path / name).read_bytes() == (straight / name).read_bytes(), name
    last = [checkpoints.load(checkpoints.newest(run)) for run in (folder.path, straight)]
    trainer_run.assert_same(last[0][0], last[1][0])
    assert last[0][1] == last[1][1]
    made, wanted = (json.loads((run / "training.json").read_text()) for run in (folder.path, straight))
    for name in ("seconds", "resumed_at"):
        del made[name], wanted[name]
    assert made == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_runs(variant, tmp_path_factory):
    parent, made = tmp_path_factory.mktemp(variant), {}

    def straight(steps):
        """The folder of a run that nobody stopped."""
        if steps not in made:
            made[steps] = parent / f"straight-{steps}"
            make(made[steps], steps=steps, **ALWAYS, **VARIANTS[variant]).fit()
        return made[steps]

    @for_many(25)
    def any_runs(choose):
        folder = Folder(parent / f"run-{len(list(parent.iterdir()))}", variant)
        calls = [do_run, do_run, do_run, do_lose_the_newest_checkpoint, do_start_that_is_refused]
        for _ in range(choose.integer(1, 6, "calls")):
            choose.one_of(calls, "call")(folder, choose, straight)

    any_runs()
