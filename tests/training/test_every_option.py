"""Every option of a training run changes its weights or its files, and the command line passes each on."""

import dataclasses

import numpy as np
import pytest
import torch
from support import trainer_run
from support.every_option import Another, Elsewhere, Refused, Same, check_has_value, entries, equal, options_of
from support.trainer_run import weights

from ddpm_ext import Philox, StepTable, cli, training
from ddpm_ext.models import load_model
from ddpm_ext.models.folder import model_sha256
from ddpm_ext.training import TrainOptions, train, tuned
from ddpm_ext.tuning import names, search, teacher, tune

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.subprocess, pytest.mark.slow]
BASE = trainer_run.UNET | {"data": "shapes", "image_size": 8, "timesteps": 20, "prediction": "v", "warmup": 1}
BASE |= {"beta_schedule": "sigmoid", "clip": 0.1, "sample_steps": 5}
LEARNED, CLASSES, PICTURES = {"variance": "learned_range"}, {"classes": True}, {"data": "pictures"}
LOGIT = {"timestep_sampler": "logit_normal"}


class Files(Another):
    """Another value that changes the files of a run, and no bit of the weights."""


VALUES = {
    "data": [
        Another({"data": "pictures"}),
        Same({"data": "pictures", "workers": 1}, "workers read ahead", PICTURES),
    ],
    "image_size": Another({"image_size": 16}),
    "channels": Another({"channels": 1}, PICTURES),
    "classes": Another(CLASSES),
    "class_dropout": Another({"class_dropout": 0.9}, CLASSES),
    "flip": Another({"flip": True}, PICTURES),
    "random_crop": Another({"random_crop": 0.5}, PICTURES),
    "skip_corrupt": Same({"skip_corrupt": True}, "no picture is damaged", PICTURES),
    "workers": Same({"workers": 0}, "the entry of data has one"),
    "steps": Another({"steps": 3}),
    "batch_size": Another({"batch_size": 5}),
    "accumulate": Same({"accumulate": 2, "dropout": 0.0}, "sums of parts", {"dropout": 0.0}),
    "lr": Another({"lr": 1e-3}),
    "lr_schedule": Another({"lr_schedule": "constant"}),
    "warmup": Another({"warmup": 2}),
    "weight_decay": Another({"weight_decay": 0.5}),
    "betas": Another({"betas": (0.5, 0.9)}),
    "adam_eps": Another({"adam_eps": 1e-2}),
    "clip": Another({"clip": 0.05, "adam_eps": 1e-2}, {"adam_eps": 1e-2}),
    "ema": Another({"ema": 0.05}),
    "extra_emas": Files({"extra_emas": (0.5,)}),
    "snapshot_every": Files({"snapshot_every": 1}),
    "autocast": [Another({"autocast": autocast}) for autocast in ("bfloat16", "float16")],
    "gradient_checkpointing": Same(
        {"gradient_checkpointing": True, "dropout": 0.3}, "activations are computed again", {"dropout": 0.3}
    ),
    "seed": Another({"seed": 5}),
    # A configuration alone: test_trainer.py.
    "model_config": Refused({"model_config": "config.json"}, "configuration decides it"),
    "widths": Another({"widths": (8, 16)}),
    "layers": Another({"layers": 2}),
    "attention": Another({"attention": (0,)}),
    "head_channels": Another({"head_channels": 4, "attention": (0,)}, {"attention": (0,)}),
    "groups": Another({"groups": 2}),
    "dropout": Another({"dropout": 0.5}),
    "timesteps": Another({"timesteps": 30}),
    "beta_schedule": Another({"beta_schedule": "linear"}),
    "prediction": Another({"prediction": "x0"}),
    "variance": [Another(LEARNED), Files({"variance": "fixed_large"})],
    "loss": [Another({"loss": loss}) for loss in ("huber", "vlb")],
    "delta": Another({"delta": 0.1, "loss": "huber"}, {"loss": "huber"}),
    "weighting": Another({"weighting": "min_snr"}),
    "vlb_weight": Another(LEARNED | {"vlb_weight": 1.0}, LEARNED),
    "timestep_sampler": Another({"timestep_sampler": "uniform"}),
    "logit_mean": Another(
        {"logit_mean": 1.0, "timestep_sampler": "logit_normal"}, {"timestep_sampler": "logit_normal"}
    ),
    "logit_std": Another({"logit_std": 3.0}, LOGIT),
    "mode_scale": Another({"mode_scale": -0.9, "timestep_sampler": "mode"}, {"timestep_sampler": "mode"}),
    "offset_noise": Another({"offset_noise": 0.3}),
    "input_perturbation": Another({"input_perturbation": 0.3}),
    "checkpoint_every": Files({"checkpoint_every": 1}),
    "log_every": Files({"log_every": 1}),
    "keep": Files({"keep": 1, "checkpoint_every": 1}, {"checkpoint_every": 1}),
    "sample_every": Files({"sample_every": 1}),
    "sample_steps": Files({"sample_steps": 3}, {"sample_every": 1}),
    "sample_count": Files({"sample_count": 4}, {"sample_every": 1}),
    "score_every": Files({"score_every": 1, "score_count": 4}),
    "score_count": Files({"score_count": 5, "score_every": 1}, {"score_count": 4, "score_every": 1}),
    "features": Refused({"features": "nowhere:features", "score_every": 1}, "features: "),
    "tune": Refused({"tune": (1,)}, "tune: got"),  # below
    "tensorboard": Refused({"tensorboard": 2}, "tensorboard is 2"),  # test_trackers.py
    "wandb": Elsewhere("test_trackers.py"),
    "device": [Same({"device": "cpu"}, "the tests run there"), Refused({"device": "nowhere"}, "device")],
    "graph": Same({"graph": True}, "a graph takes the same steps"),
    "weights_dtype": Another({"weights_dtype": "bfloat16"}),
    "push_to_hub": Elsewhere("test_hub.py"),
    "hub_private": Refused({"hub_private": True}, "hub_private: got no push_to_hub"),
}
FIELDS = [each.name for each in dataclasses.fields(TrainOptions)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and a configuration of another network."""
    from PIL import Image

    made = tmp_path_factory.mktemp("inputs")
    (made / "pictures").mkdir()
    random = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(made / "pictures" / f"{name}.png")
    (made / "config.json").write_text(
        '{"block_out_channels": [8], "down_block_types": ["DownBlock2D"], '
        '"up_block_types": ["UpBlock2D"], "norm_num_groups": 2, "layers_per_block": 2}'
    )
    return made


@pytest.fixture(scope="module")
def first():
    """Results of runs without the option, by their options."""
    return {}


def trained(out, **options):
    """The weights, and the files with their sizes, except those that hold times."""
    lines = []
    train(TrainOptions(**BASE | options), out, report=lines.append)
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    plain = {name: path.read_bytes() for name, path in files.items() if name.startswith(("samples/", "scheduler/"))}
    said = [line for line in lines if line.startswith("step")]
    scores = [path.read_text() for name, path in files.items() if name == "scores.csv"]
    return weights(out), [sorted(files), plain, len(said), scores]


@pytest.mark.filterwarnings("ignore:.*CUDA graph")
@pytest.mark.parametrize(("name", "entry"), entries(VALUES, FIELDS))
def test_another_value_is_seen_in_the_run(first, folder, tmp_path, monkeypatch, name, entry):
    check_has_value(name, entry)
    monkeypatch.chdir(folder)
    if isinstance(entry, Refused):
        with pytest.raises((TypeError, ValueError, ImportError), match=entry.message):
            trained(tmp_path / "run", **entry.given)
        return
    beside = entry.beside or {}
    if str(beside) not in first:
        first[str(beside)] = trained(tmp_path / "first", **beside)
    (before, files), (after, others) = first[str(beside)], trained(tmp_path / "run", **beside | entry.given)
    if isinstance(entry, Same):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    elif isinstance(entry, Files):
        assert equal(after, before) and others != files
    else:
        assert not equal(after, before)


def test_the_command_line_passes_every_option_on(folder, monkeypatch):
    seen = []

    def stop(chosen, out, **more):
        seen[:] = [chosen, out, more["resume"]]
        raise SystemExit(0)

    monkeypatch.setattr(training, "train", stop)
    monkeypatch.chdir(folder)
    assert {*options_of("train")} == {*FIELDS, "out", "resume", "change", "quiet"}  # test_trainer_resume.py
    for name, entry in entries(VALUES, FIELDS, (Another, Same)):
        options = {
            key: value for key, value in (BASE | (entry.beside or {}) | entry.given).items() if value is not None
        }
        flags = [f"--{key.replace('_', '-')}" for key, value in options.items() if value is True]
        words = trainer_run.as_arguments({key: value for key, value in options.items() if value is not True})
        assert cli.main(["train", *words, *flags, "--out", "run"]) == 0
        assert seen == [TrainOptions(**options), "run", False], name


@pytest.fixture
def few(monkeypatch):
    """Names, steps of the teacher and tries of tuning."""
    monkeypatch.setattr(names, "SAMPLERS", ("ddim",))
    for module, name, value in ((search, "EVALUATIONS", 2), (teacher, "STEPS", 20), (tuned, "_SEEDS", 4)):
        monkeypatch.setattr(module, name, value)


TUNED = BASE | CLASSES | {"timesteps": 100, "tune": (1,), "seed": 3, "prediction": "eps"}


@pytest.mark.parametrize("latents", [False, True])
def test_a_run_tunes_to_its_own_loop(few, tmp_path, latents):
    """With its seed, its classes and its clip, which latents do not have."""
    options = dict(TUNED)
    if latents:
        arrays = np.random.default_rng(0).normal(0, 2, (6, 3, 8, 8)).astype(np.float32), np.arange(6) % 3
        np.savez(tmp_path / "latents.npz", arr_0=arrays[0], arr_1=arrays[1])
        options |= {"data": str(tmp_path / "latents.npz"), "image_size": None}
    train(TrainOptions(**options), tmp_path / "run", report=len)
    loaded = load_model(tmp_path / "run")
    assert loaded.clip is not latents
    kwargs = loaded.classes.model_kwargs(range(4), device="cpu")
    more = {"clip_denoised": loaded.clip, "model_kwargs": kwargs, "rng": Philox(3), "seeds": 4, "progress": False}
    expected = tune(loaded.settings.diffusion(), loaded.unet, (4, *loaded.shape), steps=1, **more).table
    found = StepTable.load(tmp_path / "run" / "tuned" / "1.json")
    assert found == expected and found.notes.items() >= expected.notes.items()


def test_tables_are_made_once_for_each_model(few, tmp_path):
    path, lines = tmp_path / "tuned" / "1.json", []

    def run(**more):
        lines.clear()
        train(TrainOptions(**TUNED | more), tmp_path, report=lines.append, resume=path.parent.exists())
        return StepTable.load(path).notes, any("tuning tables for 1 calls" in line for line in lines)

    notes, made = run()
    assert made and notes["model_sha256"] == model_sha256(load_model(tmp_path)) and notes["guidance"] is None
    assert run() == (notes, False)
    path.unlink()
    assert run() == (notes, True)  # and the same
    longer, made = run(steps=3)
    assert made and longer["model_sha256"] == model_sha256(load_model(tmp_path)) != notes["model_sha256"]
