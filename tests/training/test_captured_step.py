"""A training step as a CUDA graph, by a faked torch.cuda: the weights of the steps that single calls take."""

import warnings

import pytest
import torch
from support import fake_cuda
from support.trainer_run import assert_same, make

from ddpm_ext.loop.cuda_graphs import CudaGraphs
from ddpm_ext.training import captured_step

OPTIONS = {"steps": 9, "checkpoint_every": 4}


@pytest.fixture
def faked(monkeypatch):
    log = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(captured_step, "CudaGraphs", lambda device: CudaGraphs(torch.device("cuda")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield log


def trained(folder, **options):
    """The state's tensors and the log of a run."""
    trainer = make(folder, **OPTIONS | options)
    trainer.fit()
    return trainer.state.tensors(), (folder / "losses.csv").read_text()


def check_same(found, expected):
    assert_same(found[0], expected[0])
    columns = [[line.split(",")[:4] for line in log.splitlines()] for _, log in (found, expected)]
    assert columns[0] == columns[1]


@pytest.mark.parametrize(
    "options",
    [
        {"offset_noise": 0.1, "variance": "learned_range", "loss": "huber", "prediction": "v"},
        {"input_perturbation": 0.1, "timestep_sampler": "loss_second_moment", "clip": 0.0, "autocast": "bfloat16"},
    ],
)
def test_captured_is_uncaptured(faked, tmp_path, options):
    """With dropout, a buffer that changes, a rate that rises and falls."""
    expected = trained(tmp_path / "calls", **options)
    assert not fake_cuda.CUDAGraph.instances
    found = trained(tmp_path / "graph", graph=True, **options)
    (graph,) = fake_cuda.CUDAGraph.instances
    assert graph.replays == OPTIONS["steps"] - 1
    check_same(found, expected)


def test_resumed(faked, tmp_path, monkeypatch):
    """By single calls, and again by a graph; a checkpoint does not say which; without graphs, by calls."""
    expected = trained(tmp_path / "calls")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not captured in a CUDA graph"):
        patch.setattr(captured_step, "CudaGraphs", CudaGraphs)
        check_same(trained(tmp_path / "without", graph=True), expected)
    for first, second in ((True, False), (False, True)):
        folder = tmp_path / f"{first}"
        make(folder, **OPTIONS, graph=first, resume=False).fit()
        sorted((folder / "checkpoints").iterdir())[-1].unlink()
        found = make(folder, **OPTIONS, graph=second, resume=True)
        found.fit()
        check_same((found.state.tensors(), (folder / "losses.csv").read_text()), expected)


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:graph. steps are not captured")
def test_on_a_card(device, tmp_path):
    """Without dropout; a convolution's gradients may be summed in any order."""
    runs = []
    for graph in (False, True):
        trainer = make(tmp_path / f"{graph}", dropout=0.0, device=str(device), graph=graph, **OPTIONS)
        trainer.fit()
        runs.append(trainer.state.tensors())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_several_ranks(monkeypatch, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="graph: got 2 ranks, expected 1"):
        make(tmp_path, **OPTIONS, graph=True)
