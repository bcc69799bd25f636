"""`--graph`: the loops of many batches are one capture where their shapes are equal, by a faked torch.cuda."""

import warnings

import numpy as np
import pytest
import torch
from support import fake_cuda
from support.command_line import call

from ddpm_ext.loop import loop
from ddpm_ext.loop.cuda_graphs import CudaGraphs

STEPS = ("--sampler", "ddim", "--steps", 5, "--quiet")


@pytest.fixture
def captures(monkeypatch):
    """The loops that are captured, as their CudaGraphs."""
    fake_cuda.install(monkeypatch)
    made = []

    def graphs(device):
        made.append(CudaGraphs(torch.device("cuda")))
        return made[-1]

    monkeypatch.setattr(loop, "CudaGraphs", graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield made


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven images, and a mask whose left half is known."""
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "a.npz", np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8))
    picture = np.zeros((8, 12), np.uint8)
    picture[:, :6] = 255
    pytest.importorskip("PIL.Image").fromarray(picture).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "graph"), [("noise", "step"), ("noise", "loop"), ("start", "loop"), ("inpaint", "step")]
)
def test_one_capture_for_each_shape(pets, images, tmp_path, captures, kind, graph):
    """Seven samples by twos and one: two captures, and the samples of a run without graphs, whose classes, noise and
    images differ from batch to batch."""
    options = {
        "noise": ("--num", 7, "--guidance", 2.5),
        "start": ("--start", images / "a.npz", "--strength", 0.6),
        "inpaint": ("--inpaint", images / "a.npz", "--mask", images / "mask.png"),
    }[kind]
    command = ("sample", "--model", pets, *STEPS, *options, "--batch-size", 2)
    found = []
    for more in ((), ("--graph", graph)):
        assert call(*command, *more, "--out", tmp_path / "a.npz") == 0
        with np.load(tmp_path / "a.npz") as opened:
            found.append(opened["arr_0"])
    assert np.array_equal(*found) and len(captures) == 2 and len(np.unique(found[0].reshape(7, -1), axis=0)) == 7
