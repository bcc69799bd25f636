"""No step that reads the whole tensor passes for the tutorial's, whichever steps of a loop do so."""

import pytest
import torch
from support.accelerated_tutorial import own_code, seeded
from support.eager_tutorial import GaussianDiffusion
from support.refused import refused

from ddpm_ext.integrations import accelerate

STEPS = 50


def ramp(y, dim):
    return torch.linspace(0.9, 1.1, y.shape[dim]).reshape(-1, *[1] * (y.dim() - 1 - dim))


CHANGES = {  # of a tensor (batch, channels, height, width)
    "std": lambda y: y / y.std(),
    "largest": lambda y: y / y.abs().amax(),
    "norm of a sample": lambda y: y / y.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1),
    "large std": lambda y: y / y.std().clamp(min=3),
    "branch on the mean": lambda y: y * 0.9 if y.mean() > 0 else y,
    "branch on a negative mean": lambda y: y * 0.9 if y.mean() < 0 else y,
    "branch on the batch": lambda y: y * 0.9 if len(y) < 4 else y,
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
    """A class that changes the model's output."""

    class Odd(GaussianDiffusion):
        def p_mean_variance(self, model, x_t, t, clip_denoised=True):
            changed = (lambda x, t: CHANGES[change](model(x, t))) if WHEN[when](t) else model
            return super().p_mean_variance(changed, x_t, t, clip_denoised)

    return Odd


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_that_reads_the_whole_tensor_is_refused(change, when):
    """Otherwise the rows would give other images than the class does."""
    refused(TypeError, r"its p_(sample|mean_variance) gives", accelerate, odd(change, when)(STEPS))


@pytest.mark.parametrize("change", ["std", "flipped height"])
def test_a_changed_forward_process_is_the_classs_own(change):
    """Training would see other images."""

    class Odd(GaussianDiffusion):
        def q_sample(self, x_start, t, noise=None):
            return super().q_sample(CHANGES[change](x_start), t, noise)

    fast = accelerate(Odd(STEPS))
    assert all("its q_sample gives" in fast._fused_methods().differs["q_sample"] for _ in range(2))


@own_code
def test_an_attribute_that_a_step_reads_counts():
    """Set anew, it has the effect that the class gives it; what only the loop reads has none on the rows."""

    class Tempered(GaussianDiffusion):
        def __init__(self):
            super().__init__(STEPS)
            self.temperature, self.position = 1.0, 0

        def p_sample(self, model, x_t, t, clip_denoised=True):
            mean, _, log_variance = self.p_mean_variance(model, x_t, t, clip_denoised)
            noise = torch.randn_like(x_t) * (t != 0).float().view(-1, 1, 1, 1)
            return mean + self.temperature * (0.5 * log_variance).exp() * noise

    model, x, t = (lambda x, t: x * 0.5), torch.ones(2, 3, 2, 2), torch.tensor([3, 7])
    plain = Tempered()
    fast = accelerate(plain)
    for temperature, fused in ((1.0, True), (0.5, False), (1.0, True)):
        fast.temperature = plain.temperature = temperature
        fast.position += 1
        found, expected = (seeded(1, lambda gd=gd: gd.p_sample(model, x, t))[0] for gd in (fast, plain))
        torch.testing.assert_close(found, expected)
        assert (fast.accelerated.fallbacks == {}) == fused
        fast.accelerated.fallbacks.clear()
    assert len(fast._fused_cache) == 2  # the trials, of two temperatures


@own_code
@pytest.mark.parametrize("of_class", [False, True])
def test_a_method_that_is_replaced_later_runs(of_class, monkeypatch):
    """The object is tried again, and says why its own code runs."""

    class Mine(GaussianDiffusion):
        pass

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
    assert "its p_mean_variance gives" in fast.accelerated.fallbacks["p_sample"]
