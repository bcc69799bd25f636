"""The loop with a denoiser whose exact answer is known, what it records, and where it runs.

Each element of the data is N(MU, SIGMA^2), independent of the others: see support/gaussian.py. test_options.py compares
what each step computes with plain_loop.py.
"""

import sys

import numpy as np
import pytest
import torch
from support.gaussian import TIMESTEPS, diffusion, exact_model

import ddpm_ext
from ddpm_ext import Philox

SHAPE = (4, 2, 3)

backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def test_loop_is_p_sample_again_and_again(run, device):
    """x_T has stream 1 and draw 0, the noise of a step stream 0 and draw t. The model gets a t for every sample."""
    gd, rng, told = diffusion(), Philox(2, 40), []

    def model(x, t):
        told.append(t.clone())
        return exact_model(gd)(x, t)

    x, downwards = ddpm_ext.randn(SHAPE, rng, stream=1, draw=0, device=device), range(TIMESTEPS - 1, -1, -1)
    samples = run(gd, model=model, rng=rng)
    assert [t.tolist() for t in told] == [[t] * 4 for t in downwards]
    assert all(t.dtype == torch.int64 and t.device == device for t in told)
    for t, recorded in zip(downwards, samples, strict=True):
        x = gd.p_sample(exact_model(gd), x, t, False, rng=rng)
        assert torch.equal(torch.from_numpy(recorded), x.cpu())


# ------------------------------------------------------------------------------------------------------ options


@backends
def test_record(run, backend):
    gd = diffusion(backend=backend)
    every = run(gd, steps=10, record="all")
    assert isinstance(every, list) and len(every) == 10
    assert all(isinstance(x, np.ndarray) and x.shape == SHAPE for x in every)
    assert len({x.tobytes() for x in every}) == 10  # they are copies and not one buffer
    last = run(gd, steps=10, record="last")
    copy = last.clone()
    run(gd, steps=10, record="last", rng=Philox(99))
    assert np.array_equal(last.cpu().numpy(), every[-1]) and torch.equal(last, copy)  # it belongs to the caller
    by_count = ((1, range(10)), (3, (2, 5, 8, 9)), (4, (3, 7, 9)), (5, (4, 9)), (10, (9,)), (99, (9,)))
    for record, kept in (*by_count, *((steps, sorted(steps)) for steps in ([0], [9], (7, 2, 3), []))):
        some = run(gd, steps=10, record=record)
        assert len(some) == len(kept)
        assert all(np.array_equal(x, every[i]) for x, i in zip(some, kept, strict=True))


def test_device_follows_the_model(device):
    gd, seen = diffusion(), []

    class Model(torch.nn.Module):
        def __init__(self, device):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), device=device))

        def forward(self, x, t):
            seen.append((x.device, t.device))
            return x

    options = {"steps": 1, "record": "last", "progress": False}
    gd.p_sample_loop(Model(device), SHAPE, **options)
    for asked in (device, str(device), device.type):  # the argument `device` comes before the model's device
        result = gd.p_sample_loop(Model("meta"), SHAPE, device=asked, **options)
        assert result.device == device
    assert seen == [(device, device)] * 4


@backends
def test_sample_ids_where_a_device_is_asked_for_by_its_type(run, device, backend):
    """ "cuda" means the current GPU, and tensors on it have the device "cuda:0"."""
    gd, rng = diffusion(backend=backend), Philox(9, torch.tensor([5, 2**40, 0, 1], device=device))
    options = {"steps": 3, "rng": rng, "record": "last"}
    assert torch.equal(run(gd, device=device.type, **options), run(gd, device=device, **options))


def test_progress(run, capfd, monkeypatch):
    pytest.importorskip("tqdm")
    run(diffusion(), steps=3, progress=True)  # no terminal
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(diffusion(), steps=3, progress=False)
    assert capfd.readouterr() == ("", "")
    run(diffusion(), steps=3, progress=True)
    assert "3/3" in "".join(capfd.readouterr())
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(run(diffusion(), steps=3, progress=True)) == 3
    out, err = capfd.readouterr()
    assert out == "" and err in ("", "no progress bar without tqdm: pip install tqdm\n")  # told once in a process
