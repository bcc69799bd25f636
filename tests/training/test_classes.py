"""Class-conditional training: labels of every kind of data, their dropout, and what a run with classes leaves."""

import json

import numpy as np
import pytest
import torch
from support import fake_cuda, trainer_run
from support.refused import refused
from support.trainer_run import Conditional, Tiny, make
from torch.utils.data import Subset, TensorDataset

from ddpm_ext.loop.cuda_graphs import CudaGraphs
from ddpm_ext.models import Classes
from ddpm_ext.training import TrainOptions, captured_step, checkpoints
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.data import DamagedImage, Labels, Shapes, TensorImages, as_images, labels_of, load_images

COUNT, CLASSES = 11, 4


def labelled():
    """Images whose brightness is their class."""
    numbers = torch.arange(COUNT) % CLASSES
    return TensorDataset((numbers / CLASSES).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous(), numbers)


def run(folder, *, dropout=0.1, **options):
    """A finished trainer."""
    trainer = make(folder, model=Conditional(dropout=dropout), data=labelled(), classes=True, **{"steps": 12} | options)
    trainer.fit()
    return trainer


def test_labels_of_a_folder_are_its_sub_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for path in ("b/1.png", "a/deep/2.png", "a/3.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / path)
    (tmp_path / "empty").mkdir()
    images = load_images(str(tmp_path), 4)
    found = labels_of(images)
    assert found.names == ("a", "b")
    named = {path.name: found.names[number] for path, number in zip(images.paths, found.numbers, strict=True)}
    assert named == {"1.png": "b", "2.png": "a", "3.png": "a"}
    image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "0.png")
    refused(ValueError, r"classes: .* has 0\.png outside of its sub-folders,", labels_of, load_images(str(tmp_path), 4))


def test_labels_of_datasets():
    assert labels_of(as_images(labelled())) == (pytest.approx(torch.arange(COUNT) % CLASSES), tuple("0123"))
    whole = labelled()
    whole.targets, whole.classes = [3, 1] * 5 + [0], ["a", "b", "c", "d"]
    found = labels_of(as_images(Subset(Subset(whole, [10, 9, 0]), [2, 0])))
    assert (found.numbers.tolist(), found.names) == ([3, 0], ("a", "b", "c", "d"))


def test_labels_that_are_none():
    items = type("Items", (list,), {})([torch.zeros(1, 8, 8)] * 3)
    refused(ValueError, "a Items has no labels, expected its attribute targets", labels_of, as_images(items))
    for items.targets, message in (
        (["a"] * 3, "targets of a Items are no whole numbers"),
        ([0, 1], r"labels are torch.int64 of shape \(2,\), expected int64 of shape \(3,\), one an image"),
        ([0, -1, 0], "labels are -1 to 0, expected 0 to 0 for 1 classes"),
    ):
        refused(ValueError, message, labels_of, as_images(items))


def batches(start, stop, images=None, **options):
    images = as_images(labelled()) if images is None else images
    return StepBatches(images, TrainOptions(data="given", batch_size=8, **options), start, stop, labels_of(images))


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_share_of_the_labels_is_dropped(share):
    """The others are those of their images. 800 labels: five standard deviations of a share are at most 0.09."""
    whole = batches(0, 8, class_dropout=share)
    labels = torch.cat([whole[step].labels for step in range(100)])
    images, dropped = torch.cat([whole[step].images for step in range(100)]), labels == CLASSES
    assert dropped.double().mean() == pytest.approx(share, abs=0.09 if share else 0)
    assert torch.equal(labels[~dropped] / CLASSES, images[~dropped, 0, 0, 0])


def test_image_in_place_of_a_damaged_one_has_its_own_label():
    class Damaged(TensorImages):
        def batch(self, indices, seeds=None):
            if (indices % 3 == 0).any():
                raise DamagedImage("bad")
            return super().batch(indices)

    numbers = torch.arange(8)
    images = Damaged((numbers / 8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), Labels(numbers, tuple("abcdefgh")))
    found = batches(0, 8, images, skip_corrupt=True, class_dropout=0)[0]
    assert sorted(found.labels.tolist()) == [1, 1, 2, 4, 4, 5, 7, 7]
    assert torch.equal(found.images[:, 0, 0, 0], found.labels / 8)


def test_module_gets_the_labels_of_its_images(tmp_path):
    """In every epoch each label as often as in the data, but for those that are dropped."""
    trainer = run(tmp_path / "run", class_dropout=0.0, batch_size=COUNT)
    seen = torch.tensor(trainer.model.seen).view(-1, COUNT)
    assert torch.equal(seen.sort(1).values, labelled().tensors[1].sort().values.expand(12, -1))
    assert trainer.classes == Classes(tuple("0123"))
    assert CLASSES in run(tmp_path / "dropped", class_dropout=0.5).model.seen
    found = [json.loads((tmp_path / name / "classes.json").read_text())["null"] for name in ("run", "dropped")]
    assert found == [None, CLASSES]


def test_accumulated_captured_and_resumed_runs_are_the_whole(tmp_path, monkeypatch):
    options = {"checkpoint_every": 5, "sample_every": 6, "sample_steps": 2}
    run(tmp_path / "whole", dropout=0.0, **options)
    expected = trainer_run.weights(tmp_path / "whole")
    run(tmp_path / "parts", dropout=0.0, accumulate=3, **options)
    parts = trainer_run.weights(tmp_path / "parts")
    assert all(torch.allclose(parts[name], value, atol=1e-6) for name, value in expected.items() if name != "calls")
    checkpoints.newest(tmp_path / "whole").unlink()
    run(tmp_path / "whole", dropout=0.0, resume=True, **options)
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(captured_step, "CudaGraphs", lambda device: CudaGraphs(torch.device("cuda")))
    run(tmp_path / "captured", dropout=0.0, graph=True, **options)
    for name in ("whole", "captured"):
        trainer_run.assert_same(tmp_path / name, expected)


def test_what_does_not_fit(tmp_path):
    run(tmp_path / "run", steps=2)
    images, numbers = labelled().tensors
    for changes, message in (
        ({"class_dropout": 0.2}, "resume: class_dropout is 0.2, but the run in .* has 0.1$"),
        ({"classes": False, "model": Tiny()}, "resume: model's class is Tiny"),
        ({"data": TensorDataset(images, numbers.flip(0))}, "resume: the labels' hash is"),
        ({"data": images}, "classes: a tensor of images has no labels"),
        ({"model": Tiny()}, "model: it fails for images of shape .* and their labels, its third argument"),
    ):
        given = {"model": Conditional(), "data": labelled(), "steps": 2, "classes": True} | changes
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "run", resume=True, **given).fit()


def test_shapes_depend_on_seed_and_number_alone():
    shapes = Shapes(16, seed=2**63 + 5)
    whole = shapes.batch(torch.arange(20))
    assert whole.shape == (20, 3, 16, 16) and whole.dtype == torch.float32
    assert -1 <= whole.min() < -0.8 and 0.5 < whole.max() <= 1
    assert torch.equal(shapes.batch(torch.tensor([17, 3])), whole[[17, 3]])
    assert not torch.equal(Shapes(16).batch(torch.tensor([3]))[0], whole[3])
    assert labels_of(shapes).numbers[:12].tolist() == [*range(10), 0, 1]
    for call, message in (
        (lambda: Shapes(4), "image size: got 4, expected at least 8"),
        (lambda: Shapes(count=0), "count: got 0"),
        (lambda: load_images("shapes", channels=1), "channels: got 1, but shapes have 3"),
    ):
        refused(ValueError, message, call)


def test_shapes_are_the_same_at_any_size():
    """Pixels of a coarse image are the means of a fine one's, but for what a pixel's points miss of its edge."""
    numbers = torch.arange(100)
    fine, coarse = (Shapes(size).batch(numbers) for size in (64, 16))
    pooled = torch.nn.functional.avg_pool2d(fine, 4)
    assert (pooled - coarse).abs().mean() < 0.01 and (pooled - coarse).abs().amax() < 0.35
