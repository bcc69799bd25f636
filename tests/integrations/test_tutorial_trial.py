"""No step that reads the whole tensor passes for the tutorial's, whichever steps of a loop do so."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.accelerated_tutorial import own_code, seeded, with_method
from support.eager_tutorial import GaussianDiffusion

from ddpm_ext.integrations import accelerate

STEPS, SHAPE = 50, (4, 4, 8, 8)


def ramp(y, dim):
    return torch.linspace(0.9, 1.1, y.shape[dim]).reshape(-1, *[1] * (y.dim() - 1 - dim))


CHANGES = {  # of a tensor (batch, channels, height, width)
    "std": lambda y: y / y.std(),
    "largest": lambda y: y / y.abs().amax(),
    "norm of a sample": lambda y: y / y.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1),
    "large std": lambda y: y / y.std().clamp(min=3),
    "branch on the mean": lambda y: y * 0.9 if y.mean() > 0 else y,
    "branch on a negative mean": lambda y: y * 0.9 if y.mean() < 0 else y,
    "branch on the batch": lambda y: y * 0.9 if len(y) < 5 else y,
    "mean of a sample": lambda y: y - y.mean((1, 2, 3), keepdim=True),
    "mean of a channel": lambda y: y - y.mean((2, 3), keepdim=True),
    "mean over channels": lambda y: y - y.mean(1, keepdim=True),
    "flipped channels": lambda y: y.flip(1),
    "flipped height": lambda y: y.flip(2),
    "flipped width": lambda y: y.flip(3),
    "other samples": lambda y: y.flip(0),
    "rolled height": lambda y: y.roll(1, 2),
    "numbers of a sample": lambda y: y * (y[0].numel() / 12),
    "width": lambda y: y * (y.shape[3] / 3),
    "ramp over the width": lambda y: y * ramp(y, 3),
    "ramp over the height": lambda y: y * ramp(y, 2),
}
WHEN = {
    "every step": lambda t: True,
    "the first step": lambda t: bool((t == STEPS - 1).all()),
    "the last step": lambda t: bool((t == 0).all()),
    "one step": lambda t: bool((t == STEPS // 2).all()),
}


def odd(change, when):
    """The class as somebody pasted it, who changes the model's output."""

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        changed = (lambda x, t: CHANGES[change](model(x, t))) if WHEN[when](t) else model
        return GaussianDiffusion.p_mean_variance(self, changed, x_t, t, clip_denoised)

    return with_method(p_mean_variance)


def loop(gd):
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    for t in reversed(range(STEPS)):
        x = gd.p_sample(lambda x, t: x.flip(-1) * 0.5 + 0.1, x, torch.full(SHAPE[:1], t))
    return x


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:p_sample runs the own code")
def test_a_step_that_is_no_row_runs_as_it_is(change, when):
    """Otherwise the rows would give other images than the class does."""
    made = odd(change, when)
    fast = accelerate(made(STEPS))
    assert torch.equal(loop(fast), loop(made(STEPS)))
    assert "its p_sample gives" in fast.accelerated.fallbacks["p_sample"] and fast.accelerated.fused_calls == 0


def stores(self, x):
    self.last = x
    return x


def appends(self, x):
    self.means.append(x.mean())
    return x


@pytest.mark.parametrize("stored", [stores, appends])
@pytest.mark.filterwarnings("ignore:p_sample runs the own code")
def test_a_step_that_stores_something_runs_as_it_is(stored):
    def p_sample(self, model, x_t, t, clip_denoised=True):
        return stored(self, GaussianDiffusion.p_sample(self, model, x_t, t, clip_denoised))

    plain, fast = with_method(p_sample)(STEPS), with_method(p_sample)(STEPS)
    plain.means, fast.means = [], []
    fast = accelerate(fast)
    assert torch.equal(loop(fast), loop(plain)) and fast.means == plain.means
    assert stored is appends or torch.equal(fast.last, plain.last)
    assert "its p_sample stores" in fast.accelerated.fallbacks["p_sample"]


@pytest.mark.filterwarnings("ignore:p_sample runs the own code")
def test_each_shape_and_clip_is_tried():
    """A factor on a channel that other samples do not have, and on samples that are not clipped."""

    def p_sample(self, model, x_t, t, clip_denoised=True):
        x = GaussianDiffusion.p_sample(self, model, x_t, t, clip_denoised).clone()
        x[:, 3 if clip_denoised else 0 :] *= 1.1
        return x

    made = with_method(p_sample)
    plain, fast, model = made(STEPS), accelerate(made(STEPS)), lambda x, t: 0.5 * x
    for channels, clip, fused in ((3, True, True), (4, True, False), (3, False, False), (3, True, True)):
        x, t = torch.ones(2, channels, 8, 8), torch.tensor([3, 7])
        before = fast.accelerated.fused_calls
        ours, theirs = (seeded(1, functools.partial(gd.p_sample, model, x, t, clip))[0] for gd in (fast, plain))
        torch.testing.assert_close(ours, theirs)
        assert (fast.accelerated.fused_calls > before) == fused


@own_code
@pytest.mark.parametrize("of_class", [False, True])
def test_a_method_that_is_replaced_later_runs(of_class, monkeypatch):
    """The object is tried again, and says why its own code runs."""

    Mine = with_method(GaussianDiffusion.p_mean_variance)  # pasted
    plain = Mine(STEPS)
    fast, x, t = accelerate(plain), torch.ones(2, 3, 2, 2), torch.tensor([3, 7])
    model = lambda x, t: x * 0.5  # noqa: E731
    fast.p_sample(model, x, t)
    assert fast.accelerated.fused_calls == 1

    def twice(gd, model, x_t, t, clip_denoised):
        return GaussianDiffusion.p_mean_variance(gd, lambda x, t: 2 * model(x, t), x_t, t, clip_denoised)

    other = type("Other", (GaussianDiffusion,), {"p_mean_variance": twice})
    if of_class:
        monkeypatch.setattr(Mine, "p_mean_variance", twice)
    else:
        fast.p_mean_variance = lambda *args, **options: twice(fast, *args, **options)
    found, expected = (seeded(1, lambda gd=gd: gd.p_sample(model, x, t))[0] for gd in (fast, other(STEPS)))
    assert torch.equal(found, expected)
    assert "its p_" in fast.accelerated.fallbacks["p_sample"]


SETTINGS = {  # how they are made, read, and changed
    "a number": (lambda: 1.0, lambda x: x, lambda gd, value: setattr(gd, "settings", value)),
    "a dict": (lambda: {"gain": 1.0}, lambda x: x["gain"], lambda gd, value: gd.settings.update(gain=value)),
    "a list": (lambda: [1.0], lambda x: x[0], lambda gd, value: gd.settings.__setitem__(0, value)),
    "a namespace": (
        lambda: SimpleNamespace(gain=1.0),
        lambda x: x.gain,
        lambda gd, value: setattr(gd.settings, "gain", value),
    ),
    "an array": (lambda: np.ones(1), lambda x: float(x[0]), lambda gd, value: gd.settings.fill(value)),
    "a tensor": (lambda: torch.ones(()), lambda x: x, lambda gd, value: gd.settings.fill_(value)),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("ignore:p_sample runs the own code")
def test_attributes_that_a_step_reads_count(kind):
    """Set anew, or changed within a container."""
    make, read, change = SETTINGS[kind]

    def p_sample(self, model, x_t, t, clip_denoised=True):
        return read(self.settings) * GaussianDiffusion.p_sample(self, model, x_t, t, clip_denoised)

    plain, other = with_method(p_sample)(STEPS), with_method(p_sample)(STEPS)
    plain.settings, other.settings = make(), make()
    fast, model, x, t = accelerate(other), lambda x, t: 0.5 * x, torch.ones(SHAPE), torch.full(SHAPE[:1], 7)
    for value, fused_calls in ((1.0, 1), (0.5, 1), (1.0, 2)):
        change(plain, value), change(fast, value)
        ours, theirs = (seeded(1, lambda gd=gd: gd.p_sample(model, x, t))[0] for gd in (fast, plain))
        torch.testing.assert_close(ours, theirs)
        assert fast.accelerated.fused_calls == fused_calls


@pytest.mark.parametrize("steps", [range(37, 38), range(20, 28)])
@pytest.mark.filterwarnings("ignore:p_sample runs the own code")
def test_every_timestep_is_tried(steps):
    """As of a guidance that acts in an interval alone."""

    def p_sample(self, model, x_t, t, clip_denoised=True):
        gain = 1.1 if int(t[0]) in steps else 1.0
        return gain * GaussianDiffusion.p_sample(self, model, x_t, t, clip_denoised)

    made = with_method(p_sample)
    assert torch.equal(loop(accelerate(made(STEPS))), loop(made(STEPS)))


@pytest.mark.parametrize("at", [13, 37])
@pytest.mark.filterwarnings("ignore:.* runs the own code")
def test_every_timestep_of_training_is_tried(at):
    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        return GaussianDiffusion.q_sample(self, x_start, t, noise * torch.where(t == at, 1.1, 1.0).reshape(-1, 1, 1, 1))

    made, x, t = with_method(q_sample), torch.rand(SHAPE), torch.tensor([0, at, 20, 49])
    fast, model = accelerate(made(STEPS)), lambda x, t: 0.5 * x
    for call in (lambda gd: gd.q_sample(x, t), lambda gd: gd.train_losses(model, x, t)):
        ours, theirs = (seeded(1, lambda gd=gd, call=call: call(gd))[0] for gd in (fast, made(STEPS)))
        assert torch.equal(ours, theirs)
    assert fast.accelerated.fallbacks.keys() == {"q_sample", "train_losses"}


def test_a_trial_writes_to_no_tensor_of_the_object():
    def p_sample(self, model, x_t, t, clip_denoised=True):
        self.average.mul_(0.9)
        return GaussianDiffusion.p_sample(self, model, x_t, t, clip_denoised)

    gd = with_method(p_sample)(STEPS)
    gd.average = torch.ones(3)
    fast = accelerate(gd)
    with pytest.warns(UserWarning, match="its p_sample stores average"):
        fast.p_sample(lambda x, t: x, torch.ones(SHAPE), torch.full(SHAPE[:1], 7))
    assert torch.equal(fast.average, torch.full((3,), 0.9))
