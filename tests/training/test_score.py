"""Scores of a run's samples: the Fréchet distance, whose features, and the best model that is kept."""

import importlib
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from support import trainer_run
from support.trainer_run import Tiny, make

from ddpm_ext import training
from ddpm_ext.base.ranks import Ranks
from ddpm_ext.training import TrainOptions, checkpoints, inception, score
from ddpm_ext.training.data import DamagedImage, TensorImages
from ddpm_ext.training.score import Scorer, Scores, frechet, moments, pixels, precision_recall

SCORED = {"score_every": 8, "score_count": 12, "sample_steps": 3}
IMAGES = torch.linspace(-1, 1, 9 * 64).view(9, 1, 8, 8)


def means(images):
    """Two features: the mean of each half."""
    return images.flatten(1).unflatten(1, (2, -1)).mean(2)


@pytest.mark.parametrize(("counts", "features"), [((40, 60), 5), ((6, 60), 9), ((7, 4), 9)])
def test_distance_is_the_papers(counts, features):
    """By scipy's matrix square root; also of fewer samples than features, whose covariances are singular."""
    linalg, generator = pytest.importorskip("scipy.linalg"), np.random.default_rng(0)
    one, other = (
        generator.normal(size=(count, features)) @ generator.normal(size=(features, features)) for count in counts
    )
    c, d = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(linalg.sqrtm(c).real @ d @ linalg.sqrtm(c).real).real  # similar to (c d)^(1/2), and symmetric
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * np.trace(root)
    found = frechet(moments(torch.from_numpy(one)), moments(torch.from_numpy(other)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert frechet(moments(torch.from_numpy(one)), moments(torch.from_numpy(one))) < 1e-9 * np.trace(c)


@pytest.mark.parametrize("distances", [2**23, 50])
def test_precision_and_recall_are_the_papers(monkeypatch, distances):
    """By eq. 1 and 2 of Kynkäänniemi et al. 2019, written out; whatever is computed at a time."""
    monkeypatch.setattr(score, "_DISTANCES", distances)
    images, samples = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples, expected = 2 * samples[:30] + 1, []
    for among, points in ((images, samples), (samples, images)):
        reach = [(among - one).norm(dim=1).sort().values[3] for one in among]
        inside = [any((point - one).norm() <= r for one, r in zip(among, reach, strict=True)) for point in points]
        expected.append(sum(inside) / len(points))
    assert precision_recall(images, samples) == tuple(expected) and 0.1 < expected[0] < expected[1]
    with pytest.raises(ValueError, match="got 3 samples and 40 images, expected at least 4 of both, since"):
        precision_recall(images, samples[:3])


@pytest.mark.parametrize(
    ("package", "told"), [("torch-fidelity", ("inception-v3-compat", ["2048"])), ("pytorch-fid", ([3],))]
)
def test_inception_is_the_packages(monkeypatch, package, told):
    """Each gets the levels of 8 bits as it reads them from files, grey ones as colour."""
    made, network = [], torch.nn.Identity()
    network.forward = lambda x: (x[:, :, :1].clone(),)
    make = lambda *given: made.append(given) or network  # noqa: E731
    make.BLOCK_INDEX_BY_DIM = {2048: 3}
    fake = types.SimpleNamespace(FeatureExtractorInceptionV3=make, InceptionV3=make)
    for each, module, *_ in inception._PACKAGES:
        for name in (module.partition(".")[0], module):
            monkeypatch.setitem(sys.modules, name, fake if each == package else None)
    monkeypatch.setattr(inception.metadata, "version", lambda name: "9")
    found, levels = score.features_by_name("inception"), torch.arange(0, 256, 4, dtype=torch.uint8).view(1, 1, 8, 8)
    assert (found.source, made) == (f"{package} 9", [told])
    expected = levels[0, 0, 0].repeat(1, 3)
    assert torch.equal(found(levels / 127.5 - 1), expected if package == "torch-fidelity" else expected / 255)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch, tmp_path):
    fid = pytest.importorskip("pytorch_fid.inception")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setattr(fid, "load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    where = f"put {re.escape(fid.FID_WEIGHTS_URL)} into {tmp_path / 'hub' / 'checkpoints'}$"
    with pytest.raises(ValueError, match=rf"can't load its weights \(no network\); without a network, {where}"):
        score.features_by_name("inception")


def test_pixels_are_averaged_to_16_by_16():
    images = torch.rand(2, 3, 32, 48)
    expected = images.unflatten(3, (16, 3)).unflatten(2, (16, 2)).mean((3, 5))
    assert torch.allclose(pixels(images), expected.flatten(1))
    assert torch.equal(pixels(images[..., :8, :8]), images[..., :8, :8].flatten(1))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda images: images, r"features: got shape \(6, 1, 8, 8\) for 6 images, expected \(6, features\)"),
        (lambda images: images.flatten(1) / 0, "features: got values that are not finite"),
        (lambda images: torch.ones(len(images), len(images)), "features: got 3 of some images and 6 of others"),
    ],
)
def test_wrong_features_are_refused(features, message):
    scorer = Scorer(features, TensorImages(IMAGES), TrainOptions(batch_size=6), torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        scorer.score(lambda samples: torch.zeros(len(samples), 1, 8, 8), Ranks())


def test_score_is_the_distance_to_the_images(monkeypatch):
    """Of many images, to some that are evenly spread over all."""
    options = TrainOptions(batch_size=4, score_count=9)
    scorer = Scorer(lambda images: means(images).numpy(), TensorImages(IMAGES), options, torch.device("cpu"))
    assert scorer.score(lambda samples: IMAGES[samples.start : samples.stop], Ranks()) < 1e-12
    expected = frechet(moments(means(IMAGES * 0.5).double()), moments(means(IMAGES).double()))
    assert scorer.score(lambda samples: IMAGES[samples.start : samples.stop] * 0.5, Ranks()) == pytest.approx(expected)
    monkeypatch.setattr(score, "_REFERENCE", 3)
    scorer = Scorer(means, TensorImages(IMAGES), TrainOptions(batch_size=4, score_count=3), torch.device("cpu"))
    assert scorer.score(lambda samples: IMAGES[::3][samples.start : samples.stop], Ranks()) < 1e-12


def test_damaged_images_are_left_out_of_the_reference():
    class Damaged(TensorImages):
        def batch(self, indices, seeds=None):
            if 4 in indices.tolist():
                raise DamagedImage("data: cannot read 4")
            return super().batch(indices)

    def scorer(**options):
        made = TrainOptions(batch_size=6, score_count=8, **options)
        return Scorer(means, Damaged(IMAGES), made, torch.device("cpu"))

    rest = IMAGES[[0, 1, 2, 3, 5, 6, 7, 8]]
    assert scorer(skip_corrupt=True).score(lambda samples: rest[samples.start : samples.stop], Ranks()) < 1e-12
    with pytest.raises(DamagedImage):
        scorer().score(lambda samples: rest, Ranks())


def table(folder):
    lines = (folder / "scores.csv").read_text().splitlines()
    assert lines[0] == "step,score"
    return {int(step): float(score) for step, score in (line.split(",") for line in lines[1:])}


def test_best_model_is_kept(tmp_path):
    """The scores are those of the averaged model's own samples; the weights don't depend on them."""
    lines, folder = [], tmp_path / "run"
    trainer = make(folder, steps=20, keep=9, checkpoint_every=4, features=means, report=lines.append, **SCORED)
    trainer.fit()
    found = table(folder)
    assert list(found) == [8, 16, 20]
    seeds = [training.score.seed_for(0, "reference", i) for i in range(11)]
    reference, averages = moments(means(trainer.images.batch(torch.arange(11), seeds)).double()), {}
    for step in found:
        model, path = Tiny(), folder / "checkpoints" / f"step-{step:08d}.safetensors"
        averages[step] = checkpoints.with_prefix(checkpoints.load(path)[0], "average.")
        model.load_state_dict(averages[step])
        samples = training.Trained(model.eval(), trainer.settings, (1, 8, 8)).sample(12, sampler="ddim", steps=3)
        assert found[step] == pytest.approx(frechet(moments(means(samples).double()), reference), rel=1e-4)
    best = min(found, key=found.get)
    trainer_run.assert_same(folder / "best", averages[best])
    said = json.loads((folder / "best" / "score.json").read_text())
    of = {"features": f"{__name__}:means", "samples": 12, "sample_steps": 3}
    assert said == of | {"step": best, "score": pytest.approx(found[best])}
    assert json.loads((folder / "training.json").read_text())["best"] == {"step": best, "score": said["score"]}
    told = [line for line in lines if line.startswith("score ")]
    assert f"score {found[8]:.4f} at step 8, the best so far: {folder / 'best'} has the model" == told[0]
    assert len(told) == 3
    make(tmp_path / "plain", steps=20).fit()
    trainer_run.assert_same(folder, tmp_path / "plain")


def test_a_worse_score_leaves_the_best(tmp_path, monkeypatch):
    lines, given = [], iter([3.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(Scorer, "score", lambda self, draw, ranks: next(given))
    make(tmp_path / "run", steps=32, report=lines.append, **SCORED).fit()
    assert table(tmp_path / "run") == {8: 3.0, 16: 1.0, 24: 2.0, 32: 1.0}
    assert json.loads((tmp_path / "run" / "best" / "score.json").read_text())["step"] == 16
    assert "score 2.0000 at step 24; the best is 1.0000 at step 16" in lines
    assert "score 1.0000 at step 32; the best is 1.0000 at step 16" in lines


def test_scores_of_other_features_are_forgotten():
    first, other = Scores(TrainOptions(score_count=9)), Scores(TrainOptions(score_count=8))
    first.by_step = {3: 2.0, 5: 1.0, 7: 1.0}
    assert first.best == (5, 1.0) and other.best is None
    again = Scores(TrainOptions(score_count=9))
    again.restore(json.loads(json.dumps(first.state())))
    other.restore(first.state())
    assert (again.by_step, other.by_step) == (first.by_step, {})


def test_unet_of_the_best_score_is_a_pipeline(tmp_path, capsys, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    from ddpm_ext import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "features_of_mine.py").write_text("def mean(images):\n    return images.mean(3).flatten(1)\n")
    sizes = trainer_run.as_arguments(trainer_run.UNET | {"steps": 4})
    scored = ["--score-every=2", "--score-count=6", "--sample-steps=2", "--features=features_of_mine:mean"]
    assert cli.main(["train", *sizes, *scored, "--quiet", "--out", "run"]) == 0
    assert "at step 2, the best so far: run/best has the model" in capsys.readouterr().out
    assert diffusers.DDPMPipeline.from_pretrained("run/best").unet.config.sample_size == 8
    assert cli.main(["train", *sizes, "--score-every=2", "--sample-steps=21", "--out", "other"]) == 2
    assert "sample_steps: got 21, expected at most 20" in capsys.readouterr().err
    for text, *found in (
        ("raise KeyError('at import')", "wrong raised KeyError\n", 'wrong.py", line 1, in <module>', "at import"),
        ("def f(images):\n    return images[9]", "wrong:f raised IndexError\n", "line 2, in f", "IndexError: "),
        ("def f():\n    pass", "wrong:f raised TypeError\n", "TypeError: f() takes 0 positional"),
    ):
        (tmp_path / "wrong.py").write_text(text + "\n")
        sys.modules.pop("wrong", None)
        importlib.invalidate_caches()
        assert cli.main(["train", *sizes, *scored[:3], "--features=wrong:f", "--out", "other"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"ddpm-ext train: features: {found[0]}") and not (tmp_path / "other").exists()
        assert all(part in said for part in found) and "/ddpm_ext/" not in said and "importlib" not in said
