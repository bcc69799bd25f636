"""training.data: digits, folders of images, their random crops, tensors and Datasets."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from support import trainer_run
from support.refused import refused

from ddpm_ext.training import TrainOptions
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.data import (
    DamagedImage,
    FolderImages,
    TensorImages,
    as_images,
    digits,
    labels_of,
    load_images,
    read_latents,
)

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("sklearn.datasets")


def test_digits_are_scikit_learns_in_parts():
    parts = {name: digits(name) for name in ("train", "heldout", "all")}
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 1541, "heldout": 256, "all": 1797}
    for images, labels in parts.values():
        assert images.shape == (len(labels), 1, 8, 8) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and (images.min(), images.max()) == (-1, 1)
        counts = torch.bincount(labels, minlength=10)
        assert counts.min() > 0.7 * counts.float().mean()  # each digit in each part
    every = torch.cat([parts["train"][0], parts["heldout"][0]]).flatten(1)
    assert torch.equal(every.sum(0), parts["all"][0].flatten(1).sum(0))
    theirs = datasets.load_digits()
    assert np.array_equal((parts["all"][0].squeeze(1).numpy() + 1) * 8, theirs.images)
    assert np.array_equal(parts["all"][1].numpy(), theirs.target)
    images = load_images("digits")
    assert torch.equal(images.batch(torch.tensor([5, 0])), parts["train"][0][[5, 0]]) and len(images) == 1541
    assert torch.equal(labels_of(images).numbers, parts["train"][1]) and labels_of(images).names == tuple("0123456789")


@pytest.fixture
def folder(tmp_path):
    """A wide red image with a green middle, a tall grey one in a folder below, and a text file."""
    tmp_path = tmp_path / "images"
    tmp_path.mkdir()
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[..., 0] = 255
    wide[:, 10:20] = (0, 255, 0)
    Image.fromarray(wide).save(tmp_path / "b.png")
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((20, 10), 128, np.uint8)).save(tmp_path / "a" / "tall.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_bytes(b"what a Mac puts beside b.png in an archive")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(wide).save(tmp_path / ".ipynb_checkpoints" / "b-checkpoint.png")
    return tmp_path


def test_folder(folder):
    images = FolderImages(folder, 5)
    assert (len(images), images.shape) == (2, (3, 5, 5))
    grey, green = images.batch(torch.tensor([0, 1]))
    assert grey.dtype == torch.float32 and torch.allclose(grey, torch.full((3, 5, 5), 128 / 127.5 - 1), atol=1e-6)
    middle = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1)
    assert torch.equal(green[:, :, 2], middle.expand(3, 5))  # cropped to the middle square, not squeezed
    assert load_images(str(folder), 4, 1).batch(torch.tensor([1, 0])).shape == (2, 1, 4, 4)


def test_folder_turns_by_exif(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = FolderImages(tmp_path, 8).batch(torch.tensor([0]))[0]
    assert torch.equal(found, torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1) / 127.5 - 1)


def test_a_folder_whose_images_have_one_size_needs_no_other(tmp_path):
    for name, size in (("a", (12, 12)), ("b", (12, 12))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    assert load_images(str(tmp_path)).shape == (3, 12, 12)
    Image.new("RGB", (12, 9)).save(tmp_path / "d.png")
    refused(ValueError, "image size: got none, and .*d.png is 12 by 9 pixels", load_images, str(tmp_path))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"no image")
    refused(ValueError, "image size: got none, and no image can be read", load_images, str(tmp_path / "none"))


def test_only_the_formats_of_the_endings_are_read(tmp_path):
    """Pillow goes by the content, and for PostScript it would start another program."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(postscript)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", format="GIF")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "c.png", format="JPEG")
    images = FolderImages(tmp_path, 8)
    for index, name in ((0, "a.png"), (1, "b.jpg")):
        refused(DamagedImage, f"cannot read .*{name}: .*cannot identify image", images.batch, torch.tensor([index]))
    assert images.batch(torch.tensor([2])).mean() == 1  # a wrong ending does no harm


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about damaged tags
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_damage_anywhere_is_reported_or_harmless(tmp_path, ending):
    """Whatever Pillow's decoders raise for a file that was cut or overwritten becomes DamagedImage."""
    generator, path = np.random.default_rng(0), tmp_path / f"a.{ending}"
    Image.fromarray(generator.integers(0, 255, (20, 20, 3), np.uint8)).save(path)
    whole, damaged = path.read_bytes(), 0
    for _ in range(60):
        content = bytearray(whole[: int(generator.integers(0, len(whole)))] if generator.random() < 0.5 else whole)
        for place in generator.integers(0, max(1, len(content)), 4) if content else ():
            content[place] = generator.integers(0, 255)
        path.write_bytes(content)
        try:
            assert FolderImages(tmp_path, 8).batch(torch.tensor([0])).shape == (1, 3, 8, 8)
        except DamagedImage as error:
            assert str(path) in str(error)
            damaged += 1
    assert damaged > 10


def test_fingerprints(folder):
    before = [FolderImages(folder, *sizes).fingerprint() for sizes in ((5,), (6,), (5, 1))]
    (folder / "notes.txt").write_text("no image still")
    assert FolderImages(folder, 5).fingerprint() == before[0]
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes() + b"\0")
    longer = FolderImages(folder, 5).fingerprint()
    (folder / "b.png").rename(folder / "c.png")
    last = FolderImages(folder, 5).fingerprint()
    assert len({*before, longer, last}) == 5
    assert FolderImages(folder.rename(folder.parent / "elsewhere"), 5).fingerprint() == last
    images = torch.zeros(2, 1, 3, 3)
    other = images.clone()
    other[1, 0, 2, 2] = 1e-7
    prints = {TensorImages(x).fingerprint() for x in (images, other, images[:1], images.view(2, 1, 1, 9))}
    assert len(prints) == 4 and TensorImages(images.clone()).fingerprint() in prints


def test_dataset():
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.full((2, 4, 5), index / 3, dtype=torch.float64), "label"

    images = as_images(Pairs())
    assert (len(images), images.shape, images.fingerprint()) == (3, (2, 4, 5), f"{Pairs.__qualname__} 3 (2, 4, 5)")
    batch = images.batch(torch.tensor([2, 0]))
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.tensor([2 / 3, 0]).view(2, 1, 1, 1).expand(2, 2, 4, 5))
    assert as_images(images) is images and len(as_images(torch.utils.data.TensorDataset(torch.zeros(4, 1, 2, 2)))) == 4
    with pytest.raises(TypeError, match="has no length, expected a map-style torch Dataset"):
        as_images(type("Endless", (), {"__getitem__": lambda self, index: torch.zeros(1, 2, 2)})())


def test_first_readable_item_decides_the_shape():
    class Items(list):
        def __getitem__(self, index):
            if super().__getitem__(index) is None:
                raise OSError("gone")
            return super().__getitem__(index)

    images = as_images(Items([None, torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)]))
    assert images.shape == (1, 2, 3)
    refused(DamagedImage, "data: cannot read item 0: gone", images.batch, torch.tensor([0]))
    message = r"item 2 has shape \(1, 2, 4\), expected \(1, 2, 3\), the shape of item 1"
    refused(ValueError, message, images.batch, torch.tensor([2]))
    refused(DamagedImage, "data: cannot read item 1: gone", as_images, Items([None, None]))


def test_bad_input(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    crops = r"random_crop: got 0\.8 for %s, expected a folder of images"
    images, values = torch.zeros(2, 1, 8, 8), r"the tensor has values from %s.*, expected them in \[-1, 1"
    for message, load, *given in (
        ("part: got 'test', expected one of train, heldout, all", digits, "test"),
        ("image size: got 16, but digits are 8 by 8", load_images, "digits", 16),
        ("channels: got 3", load_images, "digits", 8, 3),
        ("no such folder", FolderImages, tmp_path / "none", 8),
        ("no images in", FolderImages, tmp_path / "empty", 8),
        ("image size: got 0", FolderImages, folder, 0),
        ("channels: got 4", FolderImages, folder, 8, 4),
        (r"random_crop: got -0\.5, expected in \[0, 1\]", partial(FolderImages, random_crop=-0.5), folder, 8),
        (crops % "digits", partial(load_images, random_crop=0.8), "digits"),
        (crops % "shapes", partial(load_images, random_crop=0.8), "shapes"),
        (crops % "a Tensor" + "; a Dataset", partial(as_images, random_crop=0.8), images),
        *(("images: got", TensorImages, wrong) for wrong in (images[0], images.byte(), images[:0])),
        *((values % found, TensorImages, images + x) for x, found in ((255, "255 to 255"), (torch.nan, "nan"))),
    ):
        refused(ValueError, message, load, *given)
    assert not TensorImages(torch.zeros(2, 1, 2, 2, requires_grad=True)).batch(torch.tensor([0])).requires_grad
    ones = torch.ones(2, 1, 2, 2)
    assert TensorImages(torch._neg_view(-ones)).fingerprint() == TensorImages(ones).fingerprint()


def test_latents_bad_input(tmp_path):
    one, expected = np.zeros((1, 4, 2, 2), np.float16), r"expected whole numbers >= 0 and < 1000000, one for each"
    for latents, numbers, message in (
        (one[:0], np.zeros(0, np.int64), r"holds float16 of shape \(0, 4, 2, 2\), expected floats"),
        (one, np.array([2**62]), rf"holds arr_1, int64 of shape \(1,\), {expected}"),
        (one, np.array([-1]), rf"holds arr_1, int64 of shape \(1,\), {expected}"),
        (one, np.zeros(2, np.int64), rf"holds arr_1, int64 of shape \(2,\), {expected}"),
        (one * np.nan, np.array([0]), "the latents have values that are not finite"),
    ):
        np.savez(tmp_path / "latents.npz", latents, numbers)
        refused(ValueError, message, read_latents, tmp_path / "latents.npz")


# ------------------------------------------------------------------------------------------------------ random crops

SIZE = 8


@pytest.fixture
def ramps(tmp_path):
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


def test_squares_lie_anywhere_and_have_the_asked_sizes(ramps):
    count, smallest = 400, 0.6
    images = FolderImages(ramps, SIZE, random_crop=smallest)
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


def test_same_seed_gives_the_same_crop_read_again_or_not(ramps):
    images, indices = FolderImages(ramps, SIZE, random_crop=0.5), torch.tensor([0, 1])
    first = images.batch(indices, [3, 4])
    assert torch.equal(images.batch(indices, [3, 4]), first)  # from memory
    assert torch.equal(FolderImages(ramps, SIZE, random_crop=0.5).batch(indices, [3, 4]), first)
    assert not torch.equal(images.batch(indices, [4, 3]), first) and not FolderImages(ramps, SIZE).seeded
    Image.new("RGB", (3, 5), "white").save(ramps / "a.png")  # a small one is enlarged
    small = FolderImages(ramps, SIZE, random_crop=0.3).batch(torch.tensor([0]), [1])
    assert torch.equal(small, torch.ones(1, 3, SIZE, SIZE))
    assert FolderImages(ramps, SIZE, 1, random_crop=0.5).batch(indices, [3, 4]).shape == (2, 1, SIZE, SIZE)


def test_crops_depend_on_the_place_alone(ramps):
    options = TrainOptions(data=str(ramps), image_size=SIZE, batch_size=6, random_crop=0.5, seed=3)

    def batches(start, stop):
        return StepBatches(load_images(str(ramps), SIZE, random_crop=0.5), options, start, stop)

    whole = batches(0, 6)[3].images
    assert torch.equal(torch.cat([batches(0, 1)[3].images, batches(1, 6)[3].images]), whole)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 6
    made = trainer_run.make(ramps.parent / "run", data=str(ramps), image_size=SIZE, channels=1, random_crop=0.5)
    assert made.images.seeded


def test_every_epoch_has_all_images_in_an_order_of_its_own():
    images = torch.linspace(-1, 1, 10).view(10, 1, 1, 1)
    batches = StepBatches(as_images(images), TrainOptions(data="given", batch_size=5, seed=3), 0, 5)
    seen = torch.cat([batches[step].images.flatten() for step in range(6)]).view(3, 10).tolist()
    assert all(sorted(epoch) == images.flatten().tolist() for epoch in seen) and len(set(map(tuple, seen))) == 3


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
    with pytest.raises(ValueError, match=r"resume: random_crop is 0\.0, but the run in .* has 0\.5; --change, or"):
        trainer_run.make(tmp_path / "run", steps=2, resume=True).fit()
