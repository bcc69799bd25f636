"""Helpers of the tests that compare accelerated objects of the tutorial's class (eager_tutorial.py) with plain ones."""

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
    """Replaces a module's progress bars. Returns a list to which the arguments of each bar are appended."""
    bars = []

    def tqdm(steps, **options):
        bars.append(options)
        return steps

    monkeypatch.setattr(module, "tqdm", tqdm)
    return bars


class Given(nn.Module):
    """A model that always returns the same tensor, and counts its calls."""

    def __init__(self, output):
        super().__init__()
        self.output, self.calls = output, 0

    def forward(self, x, t):
        self.calls += 1
        return self.output


class Exact(GaussianDiffusion):
    """The tutorial's class, with coefficients in float64 for tables of any dtype."""

    def _extract(self, a, t, x_shape):
        return a.double()[t].reshape(-1, *[1] * (len(x_shape) - 1))


def seeded(seed, call):
    """The result of call() after torch.manual_seed(seed), and the generator's state after the call."""
    torch.manual_seed(seed)
    return call(), torch.get_rng_state()


def both(call, plain, fused=True):
    """The result of call(object) for an accelerated copy of the object `plain` and for `plain` itself.

    Also returns whether the generator has the same state after both calls. Checks that the accelerated object ran the
    library's code in some method, or with `fused` in no method.
    """
    fast = accelerate(plain)
    (ours, state), (theirs, their_state) = (seeded(3, lambda gd=gd: call(gd)) for gd in (fast, plain))
    assert (fast.accelerated.fallbacks == {}) == fused
    return ours, theirs, torch.equal(state, their_state)


def check(ours, theirs, truth, name="", largest=0.0):
    """Checks our float32 result: its error may be FACTOR times the error of theirs, or ULPS times the largest value.

    largest: the largest term of the sums, if it can be far above the largest value of the result. Then the rounding
        errors of the terms are far above ULPS times that value, and those of `theirs` may cancel by chance.
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == truth.shape
    exact = truth.double().cpu()
    error, their_error = ((found.double().cpu() - exact).abs().max() for found in (ours, theirs))
    rounding = ULPS * max(exact.abs().max(), largest)
    assert error <= max(FACTOR * their_error, rounding), f"{name}: {error:.2e}, {their_error:.2e}"


def with_method(function, name=None):
    """A copy of the tutorial's class, as if pasted into another file, in which `function` replaces a method.

    name: the name of that method. With None, the function's name.
    """
    pasted = {key: each for key, each in vars(GaussianDiffusion).items() if key not in ("__dict__", "__weakref__")}
    return type("Other", (), pasted | {name or function.__name__: function})
