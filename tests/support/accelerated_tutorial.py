"""What the tests of the accelerated tutorial's class share: models, seeds, truth."""

import pytest
import torch
from support import eager_tutorial
from support.eager_tutorial import GaussianDiffusion
from torch import nn

from ddpm_ext.integrations import accelerate

SHAPE = (4, 3, 5, 5)
T = torch.tensor([0, 5, 20, 49])
FACTOR, ULPS = 4, 4 * 2.0**-23
own_code = pytest.mark.filterwarnings("ignore:.*runs the own code")


def record_bars(monkeypatch, module=eager_tutorial):
    """Replaces a module's progress bars by a record of their arguments."""
    bars = []

    def tqdm(steps, **options):
        bars.append(options)
        return steps

    monkeypatch.setattr(module, "tqdm", tqdm)
    return bars


class Given(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output, self.calls = output, 0

    def forward(self, x, t):
        self.calls += 1
        return self.output


class Exact(GaussianDiffusion):
    """The class in float64, whatever dtype the tables have."""

    def _extract(self, a, t, x_shape):
        return a.double()[t].reshape(-1, *[1] * (len(x_shape) - 1))


def seeded(seed, call):
    torch.manual_seed(seed)
    return call(), torch.get_rng_state()


def both(call, plain, fused=True):
    """Ours, theirs, and whether the generator is in the same state. fused: checks that nothing falls back."""
    fast = accelerate(plain)
    (ours, state), (theirs, their_state) = (seeded(3, lambda gd=gd: call(gd)) for gd in (fast, plain))
    assert (fast.accelerated.fallbacks == {}) == fused
    return ours, theirs, torch.equal(state, their_state)


def check(ours, theirs, truth, name="", largest=0.0):
    """Ours, in float32, may be FACTOR times as far from the truth as theirs, or a few ulps of the largest value.

    largest: the largest term of the sums, where it can be far above the values: theirs may be exact by chance.
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == truth.shape
    exact = truth.double().cpu()
    error, their_error = ((found.double().cpu() - exact).abs().max() for found in (ours, theirs))
    rounding = ULPS * max(exact.abs().max(), largest)
    assert error <= max(FACTOR * their_error, rounding), f"{name}: {error:.2e}, {their_error:.2e}"


def with_method(function, name=None):
    """The class as somebody pasted it, with another method in place of its own."""
    pasted = {key: each for key, each in vars(GaussianDiffusion).items() if key not in ("__dict__", "__weakref__")}
    return type("Other", (), pasted | {name or function.__name__: function})
