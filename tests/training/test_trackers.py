"""What the log gives to TensorBoard and to Weights & Biases, here a module that stands in for its package."""

import json
import math
import sys
import types

import numpy as np
import pytest
from support.trainer_run import make, rows

from ddpm_ext import plots
from ddpm_ext.training.log import QUARTERS


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"sample_every": 10, "sample_steps": 2, "score_every": 14, "score_count": 4}
    make(tmp_path / "run", steps=14, tensorboard=True, **options).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = rows(tmp_path / "run")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (stop, pytest.approx(np.mean([row["loss"] for row in found[start:stop]]), rel=1e-5))
        for start, stop in ((0, 7), (7, 10), (10, 14))
    ]
    assert [event.step for event in events.Images("samples")] == [10]
    (event,) = events.Scalars("score")
    score = (tmp_path / "run" / "scores.csv").read_text().splitlines()[1].split(",")
    assert (event.step, event.value) == (int(score[0]), pytest.approx(float(score[1]), rel=1e-6))


def test_missing_tensorboard_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tensorboard: .* pip install tensorboard"):
        make(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


# Weights & Biases


class Run:
    """What wandb.init returns, as far as it is used."""

    def __init__(self, given):
        self.given, self.metrics, self.logged, self.finished = given, [], [], 0

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        assert not self.finished
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb_runs(monkeypatch):
    runs, module = [], types.ModuleType("wandb")

    def init(**given):
        runs.append(Run(given))
        return runs[-1]

    module.init, module.Image = init, lambda pixels: ("image", pixels)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_gets_the_numbers_and_pictures(tmp_path, wandb_runs):
    pytest.importorskip("PIL.Image")
    folder = tmp_path / "run"
    options = {"sample_every": 10, "sample_steps": 2, "sample_count": 4, "score_every": 10, "score_count": 4}
    trainer = make(folder, steps=14, wandb="flowers", **options)
    trainer.fit()
    (run,) = wandb_runs
    assert (run.given["project"], run.given["name"], run.given["dir"]) == ("flowers", "run", str(folder))
    assert run.given["config"]["batch_size"] == 6 and run.given["resume"] == "allow"
    assert run.metrics == [("*", "step")] and run.finished == 1
    lines, found = [values for values in run.logged if "loss" in values], rows(folder)
    assert [values["step"] for values in lines] == [7, 10, 14]
    for values, start in zip(lines, (0, 7, 10), strict=True):
        own = found[start : values["step"]]
        assert values["loss"] == pytest.approx(np.mean([row["loss"] for row in own]), rel=1e-6)
        assert values["learning rate"] == pytest.approx(own[-1]["lr"], rel=1e-4)
        assert values["gradient norm"] == pytest.approx(own[-1]["grad_norm"], rel=1e-4)
        assert {name for name in QUARTERS if name in values} == {
            name for name in QUARTERS if not all(math.isnan(row[name]) for row in own)
        }
    scores = dict(line.split(",") for line in (folder / "scores.csv").read_text().splitlines()[1:])
    told = {values["step"]: values["score"] for values in run.logged if "score" in values}
    assert told == {int(step): pytest.approx(float(score), rel=1e-6) for step, score in scores.items()}
    ((kind, pixels),) = [values["samples"] for values in run.logged if "samples" in values]
    assert kind == "image" and pixels.dtype == np.uint8
    assert pixels.shape == plots.grid(plots.to_uint8(trainer.sample())).shape


def test_resumed_run_has_the_same_id(tmp_path, wandb_runs):
    make(tmp_path / "run", steps=10, wandb="flowers").fit()
    make(tmp_path / "run", steps=20, wandb="flowers", resume=True).fit()
    make(tmp_path / "other", steps=2, wandb="flowers").fit()
    first, again, other = (run.given["id"] for run in wandb_runs)
    assert first == again != other
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": first}
    assert [values["step"] for values in wandb_runs[1].logged if "loss" in values] == [14, 20]


def test_wandb_is_imported_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    make(tmp_path / "run", steps=2).fit()
    with pytest.raises(ImportError, match=r"wandb: logging to Weights & Biases needs wandb: pip install wandb"):
        make(tmp_path / "other", wandb="flowers")
    assert not (tmp_path / "other").exists()


def test_wandb_that_does_not_start_is_named(tmp_path, wandb_runs, monkeypatch):
    def fail(**given):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(
        ConnectionError, match=r"wandb: cannot start a run of flowers \(no API key configured\); wandb login"
    ):
        make(tmp_path / "run", wandb="flowers").fit()
