"""Training a UNet2DModel: the files of a run, and a run that is killed and resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ddpm_ext.models.folder import load_model
from ddpm_ext.training import TrainOptions, checkpoints, learning_rate, run_options, train

for module in ("diffusers", "safetensors", "sklearn", "matplotlib"):
    pytest.importorskip(module)

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TINY = {
    "steps": 24,
    "batch_size": 4,
    "widths": (8,),
    "attention": (),
    "groups": 4,
    "timesteps": 20,
    "warmup": 2,
    "checkpoint_every": 4,
    "log_every": 8,
    "device": "cpu",
}
# The same options on the command line
COMMAND = [
    f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    for name, value in TINY.items()
]


@pytest.fixture(autouse=True)
def one_thread():
    """More threads don't help such small models, and the runs in other processes also have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "straight"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = []
    result = train(TrainOptions(**TINY), folder, command="made by a test", report=lines.append)
    torch.set_num_threads(threads)
    return folder, result, lines


def quiet(text):
    """A report that nobody reads."""


def test_files_of_a_run(straight):
    folder, result, lines = straight
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "losses.csv",
        "losses.png",
        "model_index.json",
        "options.json",
        "scheduler",
        "training.json",
        "unet",
    ]
    assert [path.name for path in checkpoints._all(folder)] == [
        "step-00000020.safetensors",
        "step-00000024.safetensors",
    ]
    with open(folder / "losses.csv") as opened:
        rows = list(csv.DictReader(opened))
    losses = [float(row["loss"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    made = json.loads((folder / "training.json").read_text())
    assert made["command"] == "made by a test"
    assert made["versions"]["torch"] == torch.__version__
    assert made["options"]["widths"] == [8]
    assert made["final_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert made["parameters"] == result.parameters > 0
    assert sum("step " in line and "loss" in line for line in lines) == 3


def test_result_is_a_pipeline_of_diffusers(straight, tmp_path):
    """diffusers loads the result, and what diffusers saves again is loaded here."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDPMPipeline.from_pretrained(straight[0])
    pipeline.set_progress_bar_config(disable=True)
    ours = load_model(straight[0])
    assert ours.settings.timesteps == pipeline.scheduler.config.num_train_timesteps == 20
    assert ours.shape == (1, 8, 8)
    images = pipeline(batch_size=2, num_inference_steps=20, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert 0 <= images.min() < images.max() <= 1
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 17])
    with torch.no_grad():
        assert torch.allclose(ours.unet(x, t).sample, pipeline.unet(x, t).sample, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.allclose(again.settings.diffusion().betas, ours.settings.diffusion().betas, rtol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(again.unet.parameters(), ours.unet.parameters(), strict=True))


def test_learned_range_is_a_pipeline_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    options = TINY | {"variance": "learned_range", "beta_schedule": "cosine", "steps": 4}
    train(TrainOptions(**options), tmp_path / "run", report=quiet)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.unet.config.out_channels == 2
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline(batch_size=2, num_inference_steps=20, output_type="np").images).all()
    ours = load_model(tmp_path / "run")
    assert ours.settings.variance == "learned_range"

    # One step of diffusers is one of ours with the same noise.
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 11
    with torch.no_grad():
        output = ours.unet(x, torch.tensor([t, t])).sample
        theirs = pipeline.scheduler.step(output, t, x, generator=torch.Generator().manual_seed(3)).prev_sample
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(
            ours.settings.diffusion().p_sample(ours.unet, x, torch.tensor([t, t]), noise=noise), theirs, atol=1e-3
        )


def test_rectified_flow_is_a_pipeline_of_diffusers(tmp_path):
    """Its scheduler takes the steps of ours, and calls the model with the same numbers."""
    from diffusers import DDPMPipeline

    options = {**TINY, "steps": 2, "checkpoint_every": 2, "timesteps": 1000}
    flow = TrainOptions(**options, beta_schedule="flow", prediction="flow")
    train(flow, tmp_path / "run", report=quiet)
    loaded, pipeline = load_model(tmp_path / "run"), DDPMPipeline.from_pretrained(tmp_path / "run")
    assert (loaded.settings.beta_schedule, loaded.settings.prediction) == ("flow", "flow")
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loop = {"sampler": "euler", "timesteps": [999, 666, 333, 0], "clip_denoised": False, "progress": False}
    ours = loaded.settings.diffusion().p_sample_loop(loaded.unet, start.shape, **loop, noise=start, record="last")
    pipeline.scheduler.set_timesteps(4)
    x = start
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="prediction is 'eps', expected 'flow' beside beta_schedule 'flow'"):
        train(replace(flow, prediction="eps"), tmp_path / "other", report=quiet)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_training_learns(tmp_path, device):
    losses = []
    options = TrainOptions(
        **TINY | {"steps": 150, "lr": 1e-2, "checkpoint_every": 1000, "batch_size": 16, "device": str(device)}
    )
    train(options, tmp_path / "run", report=quiet)
    with open(tmp_path / "run" / "losses.csv") as opened:
        losses = [float(row["loss"]) for row in csv.DictReader(opened)]
    assert np.mean(losses[-30:]) < 0.6 * np.mean(losses[:10])


@pytest.mark.subprocess
def test_killed_and_resumed_gives_the_same_weights(straight, tmp_path):
    folder = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddpm_ext", "train", *COMMAND, "--quiet", "--out", str(folder)]
    # The run waits after its first checkpoint, so that it is killed in the middle on any machine.
    slow = (
        "import sys, time\nfrom ddpm_ext import cli\nfrom ddpm_ext.training import checkpoints\n"
        "save = checkpoints.save\n"
        "def slowly(*arguments):\n    save(*arguments)\n    time.sleep(600)\n"
        "checkpoints.save = slowly\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    running = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], env=environment)
    try:
        while checkpoints.newest(folder) is None and running.poll() is None:
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert checkpoints.newest(folder).name == "step-00000004.safetensors"
    assert not (folder / WEIGHTS).exists()

    with pytest.raises(ValueError, match=r"out: .* holds a run already; resume it, or give another folder"):
        train(TrainOptions(**TINY), folder, report=quiet)
    with pytest.raises(ValueError, match=r"resume: lr is 0\.5, but .* was made with 0\.002"):
        train(TrainOptions(**TINY | {"lr": 0.5}), folder, resume=True, report=quiet)

    # Without options: those of the checkpoint apply.
    resume = [*command[:4], "--resume", "--quiet", "--out", str(folder)]
    done = subprocess.run(resume, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4 " in done.stdout
    assert (folder / WEIGHTS).read_bytes() == (straight[0] / WEIGHTS).read_bytes()


def test_new_options_are_checked_with_those_of_the_checkpoint(tmp_path, monkeypatch):
    """Not with the defaults of the options that are not given."""
    from ddpm_ext import cli, training

    found = TrainOptions(**TINY | {"batch_size": 256, "timesteps": 2000})
    train(TrainOptions(**TINY | {"steps": 1}), tmp_path / "run", report=quiet)
    began = run_options.find(tmp_path / "run")[1]
    run_options.save(tmp_path / "run", asdict(found), began["about"])
    taken = []
    monkeypatch.setattr(training, "train", lambda options, *a, **k: taken.append(options) or sys.exit(7))
    more = ["--accumulate=200", "--sample-every=5", "--sample-steps=1500", "--quiet"]
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), *more]) == 7
    assert taken == [replace(found, accumulate=200, sample_every=5, sample_steps=1500)]


def test_resume_of_a_finished_run_changes_nothing(straight, tmp_path):
    folder = straight[0]
    kept = (folder / WEIGHTS, folder / "training.json", folder / "losses.csv")
    before = [path.read_bytes() for path in kept]
    train(TrainOptions(**TINY), folder, resume=True, command="another", report=quiet)
    assert [path.read_bytes() for path in kept] == before


def test_curve_names_the_loss_and_its_failure_leaves_the_model(tmp_path, monkeypatch):
    from ddpm_ext.training import outputs

    def fail(losses, path, title, quarters):
        raise OSError(f"no curve for {title}")

    monkeypatch.setattr(outputs, "save_loss_curve", fail)
    options = TINY | {"steps": 2, "loss": "huber", "prediction": "v", "weighting": "p2"}
    with pytest.raises(OSError, match="no curve for Training loss: huber of v, weighting p2"):
        train(TrainOptions(**options), tmp_path / "run", report=quiet)
    assert (tmp_path / "run" / WEIGHTS).is_file()
    monkeypatch.undo()
    train(TrainOptions(**options), tmp_path / "run", resume=True, report=quiet)
    assert (tmp_path / "run" / "losses.png").is_file()
    assert (tmp_path / "run" / "training.json").is_file()


def test_resume_of_no_run_is_refused(tmp_path, capsys):
    """A mistyped folder does not start a run of the default options."""
    from ddpm_ext import cli

    assert cli.main(["train", "--resume", "--out", str(tmp_path / "rum")]) == 2
    message = f"resume: {tmp_path / 'rum'} holds no run, expected the folder of one that was started"
    assert capsys.readouterr().err == f"ddpm-ext train: {message}\n"
    with pytest.raises(ValueError, match=r"^resume: .* holds no run, expected"):
        train(TrainOptions(**TINY), tmp_path / "rum", resume=True, report=quiet)
    assert not list(tmp_path.iterdir())


def test_resume_before_the_first_checkpoint_trains_the_same(straight, tmp_path, monkeypatch, capsys):
    from ddpm_ext import cli
    from ddpm_ext.training.step import TrainingStep

    folder, take = tmp_path / "run", TrainingStep.take

    def die(self, images, labels):
        if self.state.step == 3:
            raise SystemExit(9)
        take(self, images, labels)

    monkeypatch.setattr(TrainingStep, "take", die)
    assert cli.main(["train", *COMMAND, "--quiet", "--out", str(folder)]) == 9
    monkeypatch.undo()
    assert checkpoints.newest(folder) is None
    with pytest.raises(ValueError, match=r"resume: lr is 0\.5, but .*options\.json was made with 0\.002"):
        train(TrainOptions(**TINY | {"lr": 0.5}), folder, resume=True, report=quiet)
    assert cli.main(["train", "--resume", "--quiet", "--out", str(folder)]) == 0
    assert "has no checkpoint yet, so its run starts again at step 0" in capsys.readouterr().out
    assert (folder / WEIGHTS).read_bytes() == (straight[0] / WEIGHTS).read_bytes()
    (folder / "options.json").write_text("{}")
    assert cli.main(["train", "--resume", "--quiet", "--out", str(folder)]) == 2
    assert "options.json is damaged; remove it, and" in capsys.readouterr().err


def test_seed_decides(straight, tmp_path):
    before = torch.random.get_rng_state()
    train(TrainOptions(**TINY | {"seed": 1}), tmp_path / "run", report=quiet)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    assert (tmp_path / "run" / WEIGHTS).read_bytes() != (straight[0] / WEIGHTS).read_bytes()


def test_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    for index in range(3):
        image.fromarray(np.full((9, 12, 3), 60 * index, np.uint8)).save(tmp_path / "images" / f"{index}.png")
    options = TrainOptions(**TINY | {"data": str(tmp_path / "images"), "image_size": 8, "flip": True, "steps": 3})
    train(options, tmp_path / "run", report=quiet)
    assert json.loads((tmp_path / "run" / "unet" / "config.json").read_text())["in_channels"] == 3


def test_loss_that_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="training: the loss is"):
        train(TrainOptions(**TINY | {"lr": 1e30}), tmp_path / "run", report=quiet)
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_learning_rate():
    options = TrainOptions(steps=1000, warmup=10, lr=1.0)
    assert learning_rate(options, 0) == pytest.approx(0.1)
    assert learning_rate(options, 500) == pytest.approx(0.5)
    assert 0 < learning_rate(options, 999) < 1e-4
    linear, constant = (replace(options, lr_schedule=name) for name in ("linear", "constant"))
    assert [learning_rate(linear, step) for step in (0, 250, 900)] == pytest.approx([0.1, 0.75, 0.1])
    assert [learning_rate(constant, step) for step in (0, 4, 9, 999)] == pytest.approx([0.1, 0.5, 1, 1])


def test_changes_at_a_resume_on_the_command_line(tmp_path, capsys):
    """A longer run needs only --steps; another learning rate needs --change, and stays for later resumes."""
    from ddpm_ext import cli

    folder = ["--quiet", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *COMMAND, "--steps", "4", *folder]) == 0
    assert cli.main(["train", "--resume", "--steps", "6", "--lr", "0.001", *folder]) == 2
    assert "was made with 0.002; --change, or change=['lr'], allows it" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--steps", "6", "--lr", "0.001", "--change", *folder]) == 0
    said = capsys.readouterr().out
    assert "changed: lr is 0.001, before 0.002" in said
    assert "changed: steps is 6, before 4" in said
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
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"lr": 0.0}, "lr: got 0.0, expected a number > 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas: got"),
        ({"adam_eps": -1.0}, "adam_eps: got -1.0, expected a number >= 0"),
        ({"ema": 1.0}, r"ema: got 1.0, expected in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout: got -0.1"),
        ({"seed": 2**64}, r"seed: got \d+, expected in \[0, 2\^64\)"),
        ({"widths": ()}, "widths: got"),
        ({"widths": (12,)}, "widths: got 12, expected multiples of groups, 8"),
        ({"attention": (3,)}, r"attention: got 3, expected levels in \[0, 3\)"),
        ({"weights_dtype": "int8"}, "weights_dtype: got int8"),
        ({"accumulate": 0}, "accumulate: got 0, expected at least 1"),
        ({"accumulate": 129}, "accumulate: got 129, expected at most the batch size, 128"),
        ({"clip": -1.0}, "clip: got -1.0, expected a number >= 0"),
        ({"clip": float("inf")}, "clip: got inf"),
        ({"delta": 0.0}, "delta: got 0.0, expected a number > 0"),
        ({"offset_noise": float("nan")}, "offset_noise: got nan"),
        ({"autocast": "float32"}, "autocast: got float32, expected one of none, bfloat16, float16"),
        ({"loss": "l2"}, "loss: got l2, expected one of mse, l1, huber"),
        ({"variance": "known"}, "variance: got known"),
        ({"weighting": "max_snr"}, "weighting: got max_snr"),
        ({"logit_std": 0.0}, "logit_std: got 0.0, expected a number > 0"),
        ({"mode_scale": 1.76}, r"mode_scale: got 1.76, expected in \[-1, 2 / \(pi - 2\)\]"),
        ({"timestep_sampler": "all"}, "timestep_sampler: got all, expected one of uniform, low_discrepancy"),
        ({"workers": -1}, "workers: got -1, expected at least 0"),
        ({"sample_every": 5, "timesteps": 20}, "sample_steps: got 50, expected at most 20"),
        ({"flip": True}, "flip: digits"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


@pytest.mark.parametrize("attention", [(0,), ()])
def test_attention_needs_a_head(tmp_path, attention):
    narrow = TINY | {"widths": (4,), "groups": 4, "attention": attention}
    with pytest.raises(ValueError, match="widths: got 4 at level 0, which has attention, expected at least 8"):
        train(TrainOptions(**narrow), tmp_path / "run", report=quiet)


def test_image_size_must_halve(tmp_path):
    with pytest.raises(ValueError, match="image size: got 8, expected a multiple of 16"):
        train(TrainOptions(**TINY | {"widths": (8,) * 5}), tmp_path / "run", report=quiet)
