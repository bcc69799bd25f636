"""Random crops of a folder's images: where they lie, how large they are, and that a resumed run has the same ones."""

import json

import numpy as np
import pytest
import torch
from support import trainer_run
from support.refused import refused

from ddpm_ext.training import TrainOptions
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.data import FolderImages, as_images, load_images

Image = pytest.importorskip("PIL.Image")
SIZE = 8


@pytest.fixture
def folder(tmp_path):
    """A wide and a tall image, in which red tells the column of a pixel and green its row, of 0 to 255."""
    images = tmp_path / "images"
    images.mkdir()
    for name, (height, width) in {"wide": (40, 80), "tall": (64, 32)}.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.rint((np.arange(width) + 0.5) / width * 255)[None]
        pixels[..., 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
        Image.fromarray(pixels).save(images / f"{name}.png")
    return images


def extent(image, channel):
    """The place of the middle of a crop and its length, as shares of the image, by the ramp in a channel."""
    ramp = (image[channel].double().mean(0 if channel == 0 else 1) + 1) / 2
    step = float(ramp[-2] - ramp[1]) / (SIZE - 3)
    return float(ramp.mean()), step * SIZE


def test_squares_lie_anywhere_and_have_the_asked_sizes(folder):
    count, smallest = 400, 0.6
    images = FolderImages(folder, SIZE, random_crop=smallest)
    assert images.seeded and images.shape == (3, SIZE, SIZE)
    for index, (height, width) in enumerate(((64, 32), (40, 80))):  # tall, wide
        drawn = images.batch(torch.full((count,), index), list(range(count)))
        shorter, sides = min(height, width), {}
        for channel, side in ((0, width), (1, height)):
            found = torch.tensor([extent(image, channel) for image in drawn])
            lengths = found[:, 1] * side / shorter  # as a share of the shorter side
            sides[channel] = lengths
            assert lengths.min() > smallest - 0.03 and lengths.max() < 1.03
            assert abs(lengths.mean() - (1 + smallest) / 2) < 0.03
            # The middle lies anywhere in the room that the square leaves.
            half = found[:, 1] / 2
            place, wide_enough = (found[:, 0] - half) / (1 - found[:, 1]).clamp(min=0.02), found[:, 1] < 0.9
            assert place[wide_enough].min() < 0.1 and place[wide_enough].max() > 0.9
            assert abs(place[wide_enough].mean() - 0.5) < 0.06
        assert torch.allclose(sides[0], sides[1], atol=0.05)  # squares, not squeezed


def test_same_seed_gives_the_same_crop_read_again_or_not(folder):
    images, indices = FolderImages(folder, SIZE, random_crop=0.5), torch.tensor([0, 1])
    first = images.batch(indices, [3, 4])
    assert torch.equal(images.batch(indices, [3, 4]), first)  # from memory
    assert torch.equal(FolderImages(folder, SIZE, random_crop=0.5).batch(indices, [3, 4]), first)
    assert not torch.equal(images.batch(indices, [4, 3]), first) and not FolderImages(folder, SIZE).seeded
    Image.new("RGB", (3, 5), "white").save(folder / "a.png")  # a small one is enlarged
    small = FolderImages(folder, SIZE, random_crop=0.3).batch(torch.tensor([0]), [1])
    assert torch.equal(small, torch.ones(1, 3, SIZE, SIZE))
    assert FolderImages(folder, SIZE, 1, random_crop=0.5).batch(indices, [3, 4]).shape == (2, 1, SIZE, SIZE)


def test_crops_depend_on_the_place_alone(folder):
    options = TrainOptions(data=str(folder), image_size=SIZE, batch_size=6, random_crop=0.5, seed=3)

    def batches(start, stop):
        return StepBatches(load_images(str(folder), SIZE, random_crop=0.5), options, start, stop)

    whole = batches(0, 6)[3].images
    assert torch.equal(torch.cat([batches(0, 1)[3].images, batches(1, 6)[3].images]), whole)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 6
    made = trainer_run.make(folder.parent / "run", data=str(folder), image_size=SIZE, channels=1, random_crop=0.5)
    assert made.images.seeded


def test_a_run_from_before_the_option_is_resumed(tmp_path):
    """Its files don't have the option; its value was what is the default now."""
    lines = []
    trainer_run.make(tmp_path / "run", steps=2).fit()
    path = tmp_path / "run" / "options.json"
    began = json.loads(path.read_text())
    del began["options"]["random_crop"]
    path.write_text(json.dumps(began))
    trainer_run.make(tmp_path / "run", steps=2, resume=True, report=lines.append).fit()
    assert not [line for line in lines if line.startswith("changed: ")]
    path.write_text(json.dumps(began | {"options": began["options"] | {"random_crop": 0.5}}))
    with pytest.raises(ValueError, match=r"resume: random_crop is 0\.0, but .* was made with 0\.5; --change, or"):
        trainer_run.make(tmp_path / "run", steps=2, resume=True).fit()


def test_bad_random_crops(folder):
    refused(ValueError, r"random_crop: got -0\.5, expected in \[0, 1\]", FolderImages, folder, SIZE, random_crop=-0.5)
    message = r"random_crop: got 0\.8 for %s, expected a folder of images"
    for name in ("digits", "shapes"):
        refused(ValueError, message % name, load_images, name, random_crop=0.8)
    refused(ValueError, message % "a Tensor" + "; a Dataset", as_images, torch.zeros(2, 1, 8, 8), random_crop=0.8)
