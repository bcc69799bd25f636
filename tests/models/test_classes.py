"""ddpm_ext.models.classes: which class a sample has, by its id alone; classes.json; folders of diffusers; shapes."""

import json
from itertools import pairwise

import pytest
import torch
from support.command_line import TINY
from support.refused import refused

from ddpm_ext import Philox, models
from ddpm_ext.models.classes import Classes
from ddpm_ext.training.data.shapes import SHAPES, Shapes

PETS = Classes(("cat", "dog", "7", "hen"), 4)


@pytest.mark.parametrize("chosen", [(), (2,), (3, 0, 0)])
def test_labels_follow_the_samples_ids(chosen):
    """Any division of the samples into batches gives each the same class; all classes in turn, if none are chosen."""
    whole, cycle = PETS.labels_of(range(40), chosen), list(chosen) or [0, 1, 2, 3]
    assert whole.tolist() == [cycle[i % len(cycle)] for i in range(40)]
    for edges in ([0, 40], [0, 1, 2, 13, 39, 40], list(range(41))):
        assert torch.equal(torch.cat([PETS.labels_of(range(a, b), chosen) for a, b in pairwise(edges)]), whole)
    for ids in (range(1, 40, 3), range(39, -1, -1), range(0)):
        assert torch.equal(PETS.labels_of(ids, chosen), whole[list(ids)])


def test_names_and_numbers():
    """A name is taken first: folders are often named by numbers in another order."""
    assert [PETS.find(wanted) for wanted in ("dog", "3", "7", "0")] == [1, 3, 2, 0]
    for wanted in ("cow", "4", "-1", ""):
        refused(ValueError, f"class: got {wanted}, expected 0 to 3 or a name: cat, dog, 7, hen$", PETS.find, wanted)


@pytest.fixture
def folder(tmp_path):
    """A class-conditional model as diffusers writes it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = TINY | {"in_channels": 1, "out_channels": 1, "num_class_embeds": 5}
    diffusers.UNet2DModel(**config).save_pretrained(tmp_path)
    return tmp_path


def test_saved_with_its_classes(folder, tmp_path):
    """Another program's model has numbers as names, and says of no class that it is the null class."""
    loaded = models.load_model(folder)
    assert loaded.classes == Classes(("0", "1", "2", "3", "4"))
    models.save_model(loaded.unet, loaded.settings, tmp_path / "saved", classes=PETS)
    assert json.loads((tmp_path / "saved" / "classes.json").read_text()) == {"names": list(PETS.names), "null": 4}
    assert models.load_model(tmp_path / "saved").classes == PETS
    models.save_model(loaded.unet, loaded.settings, tmp_path / "saved")  # replaces the classes, too
    assert models.load_model(tmp_path / "saved").classes == loaded.classes


def test_damaged_classes(folder):
    for content, message in (
        ({"names": ["a"] * 6}, "has 6 classes, expected at most 5, as config.json has"),
        ({"names": []}, r"names \[\], expected a list of names"),
        ({"names": ["a"], "null": "b"}, "null 'b', expected the number of a class or null"),
    ):
        (folder / "classes.json").write_text(json.dumps(content))
        refused(ValueError, message, models.load_model, folder)


def outlines(images):
    """How far each pixel's colour is from the mean of the border's, (batch, 256), of length 1."""
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    ground = images[..., border].mean(-1)[..., None, None]
    return torch.nn.functional.normalize((images - ground).norm(dim=1).flatten(1), dim=1)


def test_shapes_model_draws_the_classes_that_are_asked_for(device):
    """A light check of the weights: the most similar of 2,000 drawn shapes is mostly of the same class."""
    loaded = models.load_model("shapes", device=device)
    assert loaded.shape == (3, 16, 16) and loaded.classes == Classes(tuple(SHAPES), 10)
    assert sum(path.stat().st_size for path in loaded.folder.iterdir()) <= 4_000_000
    options = {"sampler": "dpmpp_2m", "steps": 12, "spacing": "trailing", "guidance": 2.5, "rng": Philox(3)}
    labels = loaded.classes.model_kwargs(range(30), guided=True, device=device)
    options |= {"model_kwargs": labels, "record": "last", "progress": False}
    with torch.no_grad():
        drawn = loaded.settings.diffusion().p_sample_loop(loaded.unet, (30, *loaded.shape), **options)
    known = Shapes(16).batch(torch.arange(2000))
    for images, least in ((Shapes(16, seed=1).batch(torch.arange(100)), 0.9), (drawn.cpu(), 0.6)):
        nearest = (outlines(images) @ outlines(known).T).argmax(1) % 10
        assert (nearest == torch.arange(len(images)) % 10).double().mean() >= least
