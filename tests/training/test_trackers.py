"""What the log gives to TensorBoard and to Weights & Biases, here a module that stands in for its package."""

import json
import math
import sys
import types
from unittest.mock import Mock, call

import numpy as np
import pytest
from support.trainer_run import make, rows

from ddpm_ext import plots
from ddpm_ext.training.log import QUARTERS


@pytest.fixture
def wandb_runs(monkeypatch):
    """What wandb.init returned: objects that note the calls."""
    runs, module = [], types.ModuleType("wandb")
    module.init = lambda **given: runs.append(Mock(given=given)) or runs[-1]
    module.Image = lambda pixels: ("image", pixels)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def logged(run, name):
    """What a run has logged under a name, by the step."""
    every = [called.args[0] for called in run.log.call_args_list]
    return {values["step"]: values[name] for values in every if name in values}


def test_wandb_gets_the_numbers_and_pictures(tmp_path, wandb_runs):
    """And TensorBoard the same ones."""
    pytest.importorskip("PIL.Image")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    options = {"sample_every": 10, "sample_steps": 2, "sample_count": 4, "score_every": 10, "score_count": 4}
    trainer = make(folder, steps=14, wandb="flowers", tensorboard=True, **options)
    trainer.fit()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (run,) = wandb_runs
    assert (run.given["project"], run.given["name"], run.given["dir"]) == ("flowers", "run", str(folder))
    assert run.given["config"]["batch_size"] == 6 and run.given["resume"] == "allow"
    run.define_metric.assert_called_once_with("*", step_metric="step")
    run.finish.assert_called_once_with()
    assert run.mock_calls[-1] == call.finish()
    found, losses = rows(folder), logged(run, "loss")
    assert list(losses) == [7, 10, 14]
    for stop, start in zip(losses, (0, 7, 10), strict=True):
        own = found[start:stop]
        assert losses[stop] == pytest.approx(np.mean([row["loss"] for row in own]), rel=1e-6)
        assert logged(run, "learning rate")[stop] == pytest.approx(own[-1]["lr"], rel=1e-4)
        assert logged(run, "gradient norm")[stop] == pytest.approx(own[-1]["grad_norm"], rel=1e-4)
        for name in QUARTERS:
            assert (stop in logged(run, name)) == (not all(math.isnan(row[name]) for row in own))
    scores = dict(line.split(",") for line in (folder / "scores.csv").read_text().splitlines()[1:])
    assert logged(run, "score") == {int(step): pytest.approx(float(score), rel=1e-6) for step, score in scores.items()}
    for name in ("loss", "score"):
        assert {event.step: pytest.approx(event.value, rel=1e-5) for event in events.Scalars(name)} == logged(run, name)
    assert [event.step for event in events.Images("samples")] == [10]
    ((kind, pixels),) = logged(run, "samples").values()
    assert kind == "image" and pixels.dtype == np.uint8
    assert pixels.shape == plots.grid(plots.to_uint8(trainer.sample())).shape


def test_resumed_run_has_the_same_id(tmp_path, wandb_runs):
    make(tmp_path / "run", steps=10, wandb="flowers").fit()
    make(tmp_path / "run", steps=20, wandb="flowers", resume=True).fit()
    make(tmp_path / "other", steps=2, wandb="flowers").fit()
    first, again, other = (run.given["id"] for run in wandb_runs)
    assert first == again != other and json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": first}
    assert list(logged(wandb_runs[1], "loss")) == [14, 20]


def test_trackers_that_cannot_be_used_are_named(tmp_path, wandb_runs, monkeypatch):
    def fail(**given):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(ConnectionError, match=r"cannot start a run of flowers \(no API key configured\); wandb login"):
        make(tmp_path / "run", wandb="flowers").fit()
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for options, message in (
        ({"tensorboard": True}, "tensorboard: writing its events needs tensorboard: pip install tensorboard$"),
        ({"wandb": "flowers"}, "wandb: logging to Weights & Biases needs wandb: pip install wandb$"),
    ):
        with pytest.raises(ImportError, match=message):
            make(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
    make(tmp_path / "other", steps=2).fit()  # they are imported only if they are asked for
