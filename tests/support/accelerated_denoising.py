"""Helpers of the tests against denoising-diffusion-pytorch; most compare accelerated objects with plain ones."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random

import pytest
import torch
from torch import nn

peer = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

if tuple(map(int, peer.__version__.split(".")[:2])) < (1, 10):
    pytest.skip("denoising_diffusion_pytorch is older than 1.10", allow_module_level=True)

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
PREDICTIONS = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
SCHEDULES = ("linear", "cosine", "sigmoid")
SHAPE = (4, 3, 6, 6)

objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def has(method, option):
    """Whether the method has this option in the installed version."""
    return option in inspect.signature(getattr(peer.GaussianDiffusion, method)).parameters


def needs(method, option):
    """A mark that skips a test if the method does not have the option."""
    return pytest.mark.skipif(not has(method, option), reason=f"{method} has no {option} in this version")


class Net(nn.Module):
    """A small model, nonlinear in all of its inputs. It counts its calls, and `told` has the inputs of the last one."""

    def __init__(self, self_condition=False):
        super().__init__()
        self.self_condition = self_condition
        self.channels = self.out_dim = SHAPE[1]
        self.random_or_learned_sinusoidal_cond = False  # older versions of the library read it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first = nn.Conv2d(SHAPE[1], 5, 3, padding=1)
            self.last = nn.Conv2d(5, SHAPE[1], 3, padding=1)
            self.known = nn.Conv2d(SHAPE[1], 5, 1)
        self.calls, self.told = 0, None

    def forward(self, x, t, x_self_cond=None):
        self.calls += 1
        self.told = (x, t, x_self_cond)
        dtype = self.first.weight.dtype
        hidden = self.first(x.to(dtype)) + (t / 300).to(dtype).sin().reshape(-1, 1, 1, 1)
        if x_self_cond is not None:
            hidden = hidden + self.known(x_self_cond.to(dtype))
        return self.last(hidden.tanh())


class Given(Net):
    """A model that always returns the same tensor object."""

    def __init__(self, output, self_condition=False):
        super().__init__(self_condition)
        self.output = output

    def forward(self, x, t, x_self_cond=None):
        self.calls += 1
        return self.output


def make(objective="pred_v", model=None, *, device="cpu", timesteps=50, **options):
    return peer.GaussianDiffusion(
        Net() if model is None else model, image_size=SHAPE[2], timesteps=timesteps, objective=objective, **options
    ).to(device)


def in64(gd):
    """A copy of the library's object on the CPU, with its buffers and its model in float64."""
    made = copy.deepcopy(gd).cpu().double()
    for module in made.modules():
        if isinstance(module, Given):
            module.output = module.output.cpu().double()
    return made


class ScriptedTorch:
    """The module torch, except that randn and randn_like return these tensors."""

    def __init__(self, **answers):
        self.answers = answers

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn_like(self, x):
        z = self.answers["randn_like"].to(x)
        assert z.shape == x.shape
        return z

    def randn(self, shape, device=None):
        z = self.answers["randn"].to(device)
        assert z.shape == tuple(shape)
        return z


@contextlib.contextmanager
def normals(**answers):
    """A context in which the library's code draws these normals. answers: a tensor for "randn" and for "randn_like"."""
    before, peer.torch = peer.torch, ScriptedTorch(**answers)
    try:
        yield
    finally:
        peer.torch = before


def states(device):
    """The states of the generators that a loop on a device may use: Python's, and torch's of the CPU and the device."""
    generator_states = [torch.get_rng_state()]
    if torch.device(device).type == "cuda":
        generator_states.append(torch.cuda.get_rng_state(device))
    return [*generator_states, torch.tensor(random.getstate()[1])]


def seeded(seed, call, device="cpu"):
    """The result of call() after seeding the generators with `seed`, and the generators' states after the call."""
    random.seed(seed)
    torch.manual_seed(seed)
    value = call()
    return value, states(device)


def same_states(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
