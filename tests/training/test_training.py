"""Training a UNet2DModel: the files of a run, and a run that is killed and resumed."""

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support import trainer_run
from support.refused import refused

from ddpm_ext import cli, training
from ddpm_ext.models import load_model
from ddpm_ext.training import TrainOptions, checkpoints, learning_rate, outputs, run_options, train
from ddpm_ext.training.options import as_json

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TINY = trainer_run.UNET | {"steps": 24, "warmup": 2, "checkpoint_every": 4, "log_every": 8}
COMMAND = trainer_run.as_arguments(TINY)


def run(folder, *, resume=False, command=None, report=len, **options):
    return train(TrainOptions(**TINY | options), folder, resume=resume, command=command, report=report)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder, lines, before = tmp_path_factory.mktemp("run") / "straight", [], torch.random.get_rng_state()
    result = run(folder, command="made by a test", report=lines.append)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    return folder, result, lines


def test_files_of_a_run(straight):
    folder, result, lines = straight
    files = {".lock", "losses.csv", "losses.png", "model_index.json", "options.json", "training.json"}
    assert {path.name for path in folder.iterdir()} == files | {"checkpoints", "scheduler", "unet"}
    names = [f"step-{step:08d}.safetensors" for step in (20, 24)]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
    rows = trainer_run.rows(folder)
    assert [row["step"] for row in rows] == list(range(1, 25))
    made = json.loads((folder / "training.json").read_text())
    assert made["command"] == "made by a test" and made["versions"]["torch"] == torch.__version__
    assert made["options"]["widths"] == [8]
    assert made["final_loss"] == pytest.approx(np.mean([row["loss"] for row in rows[-3:]]), abs=1e-6)
    assert made["final_loss_over_steps"] == 3
    assert made["parameters"] == result.parameters > 0
    assert sum("step " in line and "loss" in line for line in lines) == 3


def test_pipelines_of_a_learned_variance_and_of_a_rectified_flow(tmp_path):
    """tests/models and tests/peers compare the settings and the steps with diffusers'."""
    run(tmp_path / "learned", variance="learned_range", beta_schedule="cosine", steps=2)
    ours, pipeline = load_model(tmp_path / "learned"), diffusers.DDPMPipeline.from_pretrained(tmp_path / "learned")
    assert ours.settings.variance == pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.unet.config.out_channels == 2
    flow = {"steps": 2, "timesteps": 1000, "beta_schedule": "flow"}
    run(tmp_path / "run", prediction="flow", **flow)
    loaded, pipeline = load_model(tmp_path / "run"), diffusers.DDPMPipeline.from_pretrained(tmp_path / "run")
    assert (loaded.settings.beta_schedule, loaded.settings.prediction) == ("flow", "flow")
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    refused(ValueError, "prediction is 'eps', expected 'flow' with beta_schedule 'f", run, tmp_path / "other", **flow)
    assert not (tmp_path / "other").exists()


def test_new_options_are_checked_with_those_of_the_checkpoint(tmp_path, monkeypatch):
    """Not with the defaults of the options that are not given."""
    found = TrainOptions(**TINY | {"batch_size": 256, "timesteps": 2000})
    run(tmp_path / "run", steps=1)
    run_options.save(tmp_path / "run", asdict(found), run_options.find(tmp_path / "run")[1]["about"])
    taken = []
    monkeypatch.setattr(training, "train", lambda options, *a, **k: taken.append(options) or sys.exit(7))
    more = ["--accumulate=200", "--sample-every=5", "--sample-steps=1500", "--quiet"]
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), *more]) == 7
    assert taken == [replace(found, accumulate=200, sample_every=5, sample_steps=1500)]


def test_curve_names_the_loss_and_its_failure_leaves_the_model(tmp_path, monkeypatch):
    def fail(losses, path, title, quarters):
        raise OSError(f"no curve for {title}")

    monkeypatch.setattr(outputs, "save_loss_curve", fail)
    options = {"steps": 2, "loss": "huber", "prediction": "v", "weighting": "p2"}
    refused(OSError, "no curve for Training loss: huber of v, weighting p2", run, tmp_path / "run", **options)
    assert (tmp_path / "run" / WEIGHTS).is_file()
    monkeypatch.undo()
    run(tmp_path / "run", resume=True, **options)
    written = [tmp_path / "run" / name for name in ("losses.png", "training.json")]
    assert all(path.is_file() for path in written)
    for path in written:
        path.unlink()
    run(tmp_path / "run", resume=True, **options)
    assert all(path.is_file() for path in written)


def test_killed_run_is_refused_and_resumed(straight, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    for steps, resume in ((3, ()), (6, ("--resume",))):
        with monkeypatch.context() as patch:
            trainer_run.die_after(patch, steps)
            assert cli.main(["train", *COMMAND, *resume, "--quiet", "--out", str(folder)]) == 9
        assert (checkpoints.newest(folder) is None) == (steps == 3)
        refused(ValueError, r"resume: lr is 0\.5, but the run in .* has 0\.002", run, folder, lr=0.5, resume=True)
    assert "has no checkpoint yet, so its run starts again at step 0" in capsys.readouterr().out
    assert not (folder / WEIGHTS).exists()
    refused(ValueError, r"out: .* holds a run already; resume it, or give another folder", run, folder)
    assert cli.main(["train", "--resume", "--quiet", "--out", str(folder)]) == 0
    assert "resumed at step 4 " in capsys.readouterr().out
    assert (folder / WEIGHTS).read_bytes() == (straight[0] / WEIGHTS).read_bytes()


def test_resume_of_no_run_is_refused(tmp_path, capsys):
    """A mistyped folder does not start a run of the default options."""
    resume = ["train", "--resume", "--quiet", "--out", str(tmp_path / "rum")]
    assert cli.main(resume) == 2
    message = f"run: {tmp_path / 'rum'} holds no run, expected the folder of one that was started"
    assert capsys.readouterr().err == f"ddpm-ext train: {message}\n" and not list(tmp_path.iterdir())
    (tmp_path / "rum").mkdir()
    (tmp_path / "rum" / "options.json").write_text("{}")
    assert cli.main(resume) == 2 and "options.json is damaged; remove it, and" in capsys.readouterr().err


def test_numbers_of_numpy_and_devices_are_options():
    """options.json has them as JSON, and tuples for lists and arrays."""
    given = {"steps": np.int64(7), "lr": np.float32(0.5), "seed": np.uint64(2**63), "device": torch.device("cpu")}
    given |= {
        "image_size": np.int64(8),
        "channels": np.int8(1),
        "widths": np.array([8, 16]),
        "attention": [np.int32(1)],
        "classes": np.True_,
    }
    given |= {"betas": np.float32([0.5, 0.75]), "extra_emas": [np.float64(0.5)], "tune": (np.int64(4),)}
    plain = {"steps": 7, "lr": 0.5, "seed": 2**63, "device": "cpu", "image_size": 8, "channels": 1, "widths": (8, 16)}
    plain |= {"attention": (1,), "betas": (0.5, 0.75), "extra_emas": (0.5,), "tune": (4,), "classes": True}
    assert TrainOptions(**given) == TrainOptions(**plain) and as_json(TrainOptions(**given))
    folder = TrainOptions(data=Path("photos"), model_config=Path("config.json"), device=None)
    assert folder == TrainOptions(data="photos", model_config="config.json")


def test_learning_rate():
    options = TrainOptions(steps=1000, warmup=10, lr=1.0)
    assert learning_rate(options, 0) == pytest.approx(0.1) and learning_rate(replace(options, warmup=0), 0) == 1.0
    assert learning_rate(options, 500) == pytest.approx(0.5) and 0 < learning_rate(options, 999) < 1e-4
    linear, constant = (replace(options, lr_schedule=name) for name in ("linear", "constant"))
    assert [learning_rate(linear, step) for step in (0, 250, 900)] == pytest.approx([0.1, 0.75, 0.1])
    assert [learning_rate(constant, step) for step in (0, 4, 9, 999)] == pytest.approx([0.1, 0.5, 1, 1])


def test_changes_at_a_resume_on_the_command_line(tmp_path, capsys):
    """A longer run needs only --steps; another learning rate needs --change, and stays for later resumes."""
    folder = ["--quiet", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *COMMAND, "--steps", "4", *folder]) == 0
    assert cli.main(["train", "--resume", "--steps", "6", "--lr", "0.001", *folder]) == 2
    assert "has 0.002; --change, or change=['lr'], allows it" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--steps", "6", "--lr", "0.001", "--change", *folder]) == 0
    said = capsys.readouterr().out
    assert "changed: lr is 0.001, before 0.002" in said and "changed: steps is 6, before 4" in said
    checkpoints.newest(tmp_path / "run").unlink()  # the one before is of the run as it began
    assert cli.main(["train", "--resume", *folder]) == 0
    assert json.loads((tmp_path / "run" / "options.json").read_text())["options"]["lr"] == 0.001
    assert cli.main(["train", "--resume", "--steps", "5", *folder]) == 2
    assert "steps: got 5, expected at least 6, which this run has taken" in capsys.readouterr().err
    assert cli.main(["train", "--change", "--out", str(tmp_path / "new")]) == 2
    assert "change: belongs to --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"lr": 0.0}, "lr: got 0.0, expected a number > 0"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"ema": 1.0}, r"ema: got 1.0, expected in \[0, 1\)"),
        ({"seed": 2**64}, r"seed: got \d+, expected in \[0, 2\^64\)"),
        ({"widths": (4,), "attention": (0,)}, "widths: got 4 at level 0, .*, expected at least head_channels, 8"),
        ({"widths": (8,) * 5}, "image size: got 8, expected a multiple of 16"),
        ({"widths": (12,)}, "widths: got 12, expected multiples of groups, 8"),
        ({"accumulate": 129}, "accumulate: got 129, expected at most the batch size, 128"),
        ({"autocast": "float32"}, "autocast: got float32, expected one of none, bfloat16, float16"),
        ({"mode_scale": 1.76}, r"mode_scale: got 1.76, expected in \[-1, 2 / \(pi - 2\)\]"),
        ({"sample_every": 5, "timesteps": 20}, "sample_steps: got 50, expected at most 20"),
        ({"flip": True}, "flip: digits"),
        ({"extra_emas": (0.9, 0.9)}, r"extra_emas: got .*, expected different numbers in \[0, 1\)"),
        ({"tune": (0,)}, "tune: got "),
        ({"tune": (6,), "timesteps": 20}, "tune: got "),
        ({"tune": (6,), "variance": "learned_range"}, "tune: got "),
        ({"graph": True, "gradient_checkpointing": True}, "graph: got gradient_checkpointing"),
        ({"graph": True, "accumulate": 2}, "graph: got accumulate 2, expected 1"),
        ({"graph": True, "autocast": "float16"}, "graph: got autocast float16, .* expected another"),
    ],
)
def test_bad_options(changes, message, tmp_path):
    """Some are found by the model alone."""
    of_model = "level" in message or "multiple of 16" in message
    refused(ValueError, message, partial(run, tmp_path / "run") if of_model else TrainOptions, **changes)
