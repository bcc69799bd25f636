"""Trainer refuses data, models and folders that don't fit, and loses no file that was there before."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support import trainer_run
from support.command_line import check_refused
from support.refused import refused
from support.trainer_run import Squares, Tiny, make

from ddpm_ext import GaussianDiffusion
from ddpm_ext.training import Trainer, TrainOptions, batches, checkpoints, log
from ddpm_ext.training.step import TrainingStep


@pytest.mark.parametrize("option", ["features evil:f", "wandb theirs", "push-to-hub they/model"])
def test_a_folder_alone_imports_no_code_and_sends_nothing(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise RuntimeError('imported')")
    name, value = option.split()
    given = {name.replace("-", "_"): value, "score_every": 1}
    (tmp_path / "options.json").write_text(json.dumps({"step": 0, "options": given, "about": {}}))
    check_refused(capsys, f"expected --{name} again on the command line", "train", "--resume", "--out", ".")
    assert "evil" not in sys.modules and str(tmp_path) not in sys.path


class Items:
    """A dataset of given items; an exception is raised when it is read."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def half_frozen():
    model = Tiny()
    model.into.requires_grad_(False)
    return model


class Noted(Tiny):
    """Has more than tensors in its state dict."""

    def get_extra_state(self):
        return {"note": 1}


IMAGE = torch.zeros(1, 8, 8)


BAD = [
    ({"data": Items()}, "data: the dataset is empty"),
    ({"data": iter([IMAGE])}, "data is a list_iterator, expected 'digits', 'shapes', a folder,"),
    ({"data": Items(3)}, "data: item 0 is a int, expected a floating tensor"),
    ({"data": Items(IMAGE.byte())}, r"item 0 is a torch.uint8 \(1, 8, 8\), expected a floating"),
    ({"data": Items(IMAGE + 255)}, r"item 0 has values from 255 to 255, expected them in \[-1, 1\]"),
    ({"data": torch.zeros(3, 8, 8)}, "images: got torch.float32 of shape"),
    ({"data": "nowhere"}, "data: no such folder: nowhere; expected one, an .npz of latents, 'digits'"),
    ({"model": Tiny(3)}, r"model: it fails for images of shape \(1, 8, 8\) \(.*channels"),
    ({"model": Tiny(1, 2)}, r"model: it returns shape \(1, 2, 8, 8\) for images of shape \(1, 1, 8, 8\)"),
    ({"model": Tiny().requires_grad_(False)}, "model: a Tiny has no parameters to train, expected at"),
    ({"model": Noted()}, "model: _extra_state in its state dict is a dict, expected a tensor"),
    ({"model": "nowhere.json"}, "model: no such file: nowhere.json"),
    ({"model": {"in_channels": 3}}, "model: config has in_channels 3, expected 1 for images"),
    ({"model": {"num_class_embeds": 4}}, "num_class_embeds 4, expected None for .* without classes"),
    ({"model": {}, "widths": (8,), "groups": 4, "attention": ()}, r"widths: got \(8,\), but the model's"),
    ({"loss": "vlb", "weighting": "snr", "beta_schedule": "cosine"}, "weighting is given with loss"),
    ({"weighting": "min_snr"}, "weighting is 'min_snr', but alphas_cumprod ends at 0"),
    ({"sample_every": 1, "sample_steps": 5, "data": torch.zeros(2, 2, 8, 8)}, "images have 2 channels"),
    ({"colour": "red"}, "colour"),
    ({"lr": 10**400}, "lr: got inf, expected a number > 0"),
    ({"attention": (0, 1.5)}, r"attention\[1\] is 1.5, expected an int"),
    ({"betas": (0.9, "0.99")}, r"betas\[1\] is '0.99', expected a number"),
    ({"device": 0}, "device is '0', expected a torch device such as 'cpu' or 'cuda:0'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit(tmp_path, monkeypatch, options, message):
    if isinstance(options.get("model"), dict):
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message) as info:
        make(tmp_path / "run", **options)
    assert "\n" not in str(info.value) and not list(tmp_path.iterdir())


def test_arguments_of_another_type(tmp_path):
    for option in dataclasses.fields(TrainOptions):
        for kind, expected in (("int", "an int"), ("float", "a number"), ("bool", "a bool"), ("tuple", "a tuple of n")):
            if option.type.startswith(kind):
                refused(TypeError, f"^{option.name} is 1j, expected {expected}", TrainOptions, **{option.name: 1j})
    refused(TypeError, "diffusion is a str, expected a Gau", Trainer, Tiny(), "linear", Squares(), tmp_path / "run")
    gd = GaussianDiffusion(20, prediction="x_prev")
    refused(ValueError, "diffusion: its prediction is 'x_prev', exp", Trainer, Tiny(), gd, Squares(), tmp_path / "run")
    refused(ValueError, "out: got an empty path, expected a folder", Trainer, out="")
    refused(TypeError, "step is no option of training, expected one such as 'steps'", Trainer, step=2)


class Worker(Items):
    """A dataset whose items do something when a worker reads them."""

    def __init__(self, act):
        super().__init__(IMAGE, IMAGE)
        self.act = act

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            self.act()
        return super().__getitem__(index)


@pytest.mark.subprocess
def test_worker_that_gives_no_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "_BATCH_TIMEOUT", 2)
    message = r"^data: the workers gave no batch for 2 s; expected data that can be read, or workers=0$"
    with pytest.raises(TimeoutError, match=message):
        make(tmp_path / "run", data=Worker(partial(time.sleep, 600)), workers=1).fit()


FULL = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "owner, name, error",
    [
        (torch.UntypedStorage, "_share_fd_cpu_", RuntimeError(FULL)),
        (torch.multiprocessing, "Queue", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_shared_memory_that_is_full(tmp_path, monkeypatch, owner, name, error):
    """For a batch, and for the workers themselves."""
    monkeypatch.setattr(batches, "_BATCH_TIMEOUT", 60)
    monkeypatch.setattr(owner, name, Mock(side_effect=error))
    message = r"^data: the shared memory in /dev/shm is full, .* --shm-size .*, or workers=0$"
    refused(OSError, message, make(tmp_path / "run", workers=1).fit)


@pytest.mark.subprocess
def test_worker_that_dies(tmp_path):
    data = Items(IMAGE, (IMAGE, 1), torch.zeros(1, 8, 9))
    message = r"^data: item 2 has shape \(1, 8, 9\), expected \(1, 8, 8\), the shape of item 0$"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", data=data, workers=1).fit()
    data = Worker(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match=r"^data: a worker died \(DataLoader worker .*expected .* workers=0$"):
        make(tmp_path / "run", data=data, workers=1).fit()


@pytest.mark.subprocess
def test_worker_that_dies_while_no_batch_is_awaited(tmp_path, monkeypatch):
    """Its end is noticed wherever the program is just then."""
    asked, read = multiprocessing.get_context("fork").Event(), []
    others = set(multiprocessing.active_children())

    def die():  # in place of reading for the second batch
        read.append(1)
        if len(read) > trainer_run.SIZES["batch_size"]:
            asked.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    def take(step, images, labels):
        asked.set()
        for worker in set(multiprocessing.active_children()) - others:
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(TrainingStep, "take", take)
    with pytest.raises(ChildProcessError, match=r"^data: a worker died \(DataLoader worker .*expected .* workers=0$"):
        make(tmp_path / "run", data=Worker(die), workers=1).fit()
    assert set(multiprocessing.active_children()) <= others


def test_skipped_image_is_replaced_by_the_next_readable_one(tmp_path):
    """Gives the same weights as with the next image in its place; fails if no image can be read."""
    good = [torch.full((1, 8, 8), value / 4) for value in range(4)]
    make(tmp_path / "skipped", data=Items(*good[:3], OSError("a"), OSError("b")), skip_corrupt=True, steps=10).fit()
    make(tmp_path / "replaced", data=Items(*good[:3], good[0], good[0]), steps=10).fit()
    trainer_run.assert_same(tmp_path / "skipped", tmp_path / "replaced")

    class Fading(Items):
        def __getitem__(self, index):
            image, self.items = super().__getitem__(0), [OSError("gone")] * 3
            return image

    with pytest.raises(ValueError, match="data: none of the 3 images can be read, the last because: data: cannot read"):
        make(tmp_path / "run", data=Fading(*good[:3]), skip_corrupt=True).fit()


@pytest.mark.subprocess
def test_folder_with_a_corrupt_image(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), np.uint8)
        image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    broken = tmp_path / "images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = {"data": str(tmp_path / "images"), "image_size": 8, "channels": 1, "steps": 6}
    refused(ValueError, r"^data: cannot read .*2\.png: ", lambda: make(tmp_path / "run", **options).fit())
    lines = []
    make(tmp_path / "run", **options, skip_corrupt=True, workers=1, report=lines.append).fit()
    assert sum(line.startswith(f"skipped: data: cannot read {broken}: ") for line in lines) == 1
    (skipped,) = json.loads((tmp_path / "run" / "training.json").read_text())["skipped"]
    assert skipped.startswith(f"data: cannot read {broken}: ")


def test_loss_that_is_not_finite_names_timesteps_and_checkpoint(tmp_path, monkeypatch):
    trainer, seen = make(tmp_path / "run", log_every=50), {}
    take = TrainingStep.take

    def spoil(self, images, labels):
        if self.state.step == 23:
            images = images.clone()
            images[4] = torch.nan
        take(self, images, labels)
        seen[self.state.step - 1] = self._pending[-1].t.tolist()

    monkeypatch.setattr(TrainingStep, "take", spoil)
    with pytest.raises(ValueError) as info:
        trainer.fit()
    path = tmp_path / "run" / "checkpoints" / "step-00000020.safetensors"
    message = f"training: the loss is nan at step 23, at timesteps {seen[23][4]}; the newest checkpoint is {path}"
    assert str(info.value) == f"{message}; a lower lr may help"
    assert checkpoints.newest(tmp_path / "run") == path  # no checkpoint has weights that are not finite


class Rough(Tiny):
    """Its output is finite, but its gradient is NaN."""

    def forward(self, x, t):
        zero = 0 * self.time.weight.sum()
        return super().forward(x, t) + zero.square().sqrt()


def test_gradient_that_is_not_finite(tmp_path):
    """With loss scales, those from 65536 down to 1 are tried; then the run stops, as it does without one."""
    with pytest.raises(ValueError, match=r"gradient's norm is nan at step 0, at timesteps .*, \.\.\.; nothing was"):
        make(tmp_path / "plain", model=Rough(), batch_size=20).fit()
    with pytest.raises(ValueError, match=r"training: the gradient's norm is nan at step 14, .*step-00000010\.safeten"):
        make(tmp_path / "run", model=Rough(), autocast="float16").fit()
    assert checkpoints.load(checkpoints.newest(tmp_path / "run"))[1]["scaler"]["scale"] == 65536 / 2**10


def test_run_that_was_stopped_before_a_checkpoint_is_not_continued(tmp_path):
    def report(text):
        if text.startswith("step "):
            raise KeyboardInterrupt

    trainer = make(tmp_path / "run", report=report)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    refused(ValueError, "this Trainer has taken 7 steps of which no checkpoint was saved; make", trainer.fit)
    make(tmp_path / "run", steps=8).fit()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run of 20 steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    make(folder, steps=20).fit()
    return folder


@pytest.fixture
def copied(done, tmp_path):
    """A copy of it, which a test may damage."""
    return shutil.copytree(done, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, "lr is 0.5, but the run in .* has 0.002"),
        ({"squares": 12}, "the number of images is 12, but the run in .* has 11"),
        ({"data": torch.zeros(11, 1, 8, 8)}, "the images' fingerprint is .*, but the run in .* has Squares 11"),
        ({"model": half_frozen()}, r"the frozen parameters is \['into.weight', 'into.bias'\], but the run .* has \[\]"),
        ({"width": 8}, r"model's into.weight is \[8, 1, 3, 3\], but the run in .* has \[6, 1, 3, 3\]"),
    ],
)
def test_resumed_with_something_else(done, options, message):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    refused(ValueError, f"^resume: {message}", lambda: make(done, resume=True, **{"steps": 20} | options).fit())
    changed = {path for path in done.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert {path.name for path in changed} <= {".lock"}


KINDS = {"samples", "best", "checkpoints", "tensorboard", "ema-0.5", "tuned", "scheduler"}, {"losses.png", "scores.csv"}


@pytest.mark.parametrize("name", sorted(KINDS[0] | KINDS[1]))
def test_a_file_in_the_place_of_a_folder_is_found_before_the_first_step(tmp_path, monkeypatch, name):
    """And a folder in that of a file; folders that are not there are not made, since an empty best is no model."""
    folder = tmp_path / "run"
    monkeypatch.setattr(TrainingStep, "take", lambda *_: pytest.fail("a step was taken"))
    wanted = {"sample_every": 9, "score_every": 9, "sample_steps": 2, "extra_emas": (0.5,), "tensorboard": True}
    monkeypatch.setattr("ddpm_ext.training.trainer.check_extras", bool)
    trainer = make(folder, tune=(2,), timesteps=100, **wanted)
    folder.mkdir()
    (folder / name).touch() if name in KINDS[0] else (folder / name).mkdir()
    refused(ValueError, rf"^out: .*{name}", trainer.fit)
    assert {path.name for path in folder.iterdir()} == {name}


def test_two_runs_in_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    second = []

    def report(text):
        if text.startswith("step ") and not second:
            with pytest.raises(ValueError, match="out: another run is at work in") as info:
                make(tmp_path / "run", resume=True).fit()
            second.append(info)

    make(tmp_path / "run", report=report).fit()
    assert second


def test_full_disk_at_the_start(tmp_path, monkeypatch):
    for at, name in ((1, r"out: cannot write .*options\.json"), (3, r"losses: cannot write .*losses\.csv")):
        trainer, full = make(tmp_path / str(at)), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(log.os, "fsync", Mock(side_effect=[None] * (at - 1) + [full]))
        refused(OSError, rf"^{name}: No space left on device$", trainer.fit)
        monkeypatch.undo()


def test_weights_of_a_checkpoint_that_are_not_finite(copied):
    tensors, header = checkpoints.load(checkpoints.newest(copied))
    tensors["model.into.weight"][0] = torch.nan
    checkpoints.save(copied, 20, tensors, header, keep=2)
    with pytest.raises(ValueError, match=r"^resume: .* holds values of model.into.weight that are not finite numbers$"):
        make(copied, steps=20, resume=True).fit()
