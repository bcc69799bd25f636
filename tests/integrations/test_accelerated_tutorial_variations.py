"""Variations of the tutorial's class: which are taken, which are refused, and which of their methods fall back."""

import inspect
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.accelerated_tutorial import SHAPE, Exact, T, both, own_code, record_bars, seeded, with_method
from support.eager_tutorial import GaussianDiffusion
from support.peer_training import Net
from support.refused import refused
from torch import nn

import ddpm_ext
from ddpm_ext.integrations import accelerate
from ddpm_ext.integrations.tutorial import resembles


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    return record_bars(monkeypatch)


def same(fast, plain, call):
    """Checks that a call of both gives the same, from the same seed; the result, and the generator's states."""
    (ours, state), (theirs, their_state) = (seeded(1, lambda gd=gd: call(gd)) for gd in (fast, plain))
    torch.testing.assert_close(ours, theirs)
    return ours, state, their_state


# --------------------------------------------------------------------------------------------------- what resembles it


def scaled(self, model, x_t, t, clip_denoised=True, scale=1.0):
    return GaussianDiffusion.p_sample(self, model, x_t, t, clip_denoised) * scale


def with_noise(self, model, x_start, t, noise=None):
    noise = torch.randn_like(x_start) if noise is None else noise
    return F.mse_loss(noise, model(self.q_sample(x_start, t, noise), t))


Further = with_method(scaled, "p_sample")
Further.train_losses = with_noise


def with_buffers(self, timesteps=50):
    nn.Module.__init__(self)
    for name, table in vars(GaussianDiffusion(timesteps)).items():
        if isinstance(table, torch.Tensor):
            self.register_buffer(name, table.float())
    self.timesteps = timesteps


def gathered(self, a, t, x_shape):
    return a.gather(-1, t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


# An nn.Module with buffers, whose _extract is a function.
METHODS = {name: each for name, each in vars(GaussianDiffusion).items() if inspect.isfunction(each)}
Gathers = type("Gathers", (nn.Module,), METHODS | {"__init__": with_buffers, "_extract": gathered})


OTHERS = {  # with other parameters
    "p_sample": lambda self, model, x, t, clip_denoised=True: None,
    "q_sample": lambda self, x_start, t, *, noise=None: None,
    "p_mean_variance": lambda self, model, x_t, t, clip_denoised=False: None,
    "p_sample_loop": lambda self, shape, model: None,
}


def test_resembles():
    assert all(map(resembles, (GaussianDiffusion, Further, Gathers, Exact)))
    assert not resembles(ddpm_ext.GaussianDiffusion)
    assert not resembles(object)
    for name, method in OTHERS.items():
        other = with_method(method, name)
        assert not resembles(other), name
        refused(TypeError, r"expected .*a class with the tutorial's p_sample", accelerate, other(50))
    assert resembles(with_method(lambda self, model, x_start, t, noise: None, "train_losses"))  # its own affair
    assert not resembles(with_method(None, "sample"))


@own_code
def test_a_variation_with_further_arguments():
    plain, model = Further(50), Net()
    x, t, z = torch.rand(SHAPE), torch.tensor([0, 5, 20, 49]), torch.rand(SHAPE)
    fast = accelerate(plain)
    for call in (lambda gd: gd.p_sample(model, x, t), lambda gd: gd.train_losses(model, x, t)):
        ours, theirs, same_draws = both(call, plain)
        torch.testing.assert_close(ours, theirs)
        assert same_draws
    for method, call in {
        "p_sample": lambda gd: gd.p_sample(model, x, t, True, 0.5),
        "train_losses": lambda gd: gd.train_losses(model, x, t, noise=z),
    }.items():
        same(fast, plain, call)
        assert fast.accelerated.fallbacks[method] == "it has arguments that the tutorial's hasn't"


def test_a_module_with_buffers():
    """Its keys stay the same, and the rows follow a loaded state."""
    plain, model, x, t = Gathers(), Net(), torch.rand(SHAPE), torch.tensor([0, 5, 20, 49])
    fast = accelerate(plain)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    other = Gathers()
    other.posterior_mean_coef1 *= 0.5
    for state in (plain, other):
        fast.load_state_dict(state.state_dict())
        same(fast, state, lambda gd: gd.p_sample(model, x, t))
    assert plain.posterior_mean_coef1[3] != 0.5 and fast.accelerated.fallbacks == {}


# ---------------------------------------------------------------------------------------------------- what is tried out


def own_step(mean=None, deviation=None, early=False):
    """A p_sample that does something else."""

    def p_sample(self, model, x_t, t, clip_denoised=True):
        noise = torch.randn_like(x_t) if early else None
        found, _, log_variance = self.p_mean_variance(model, x_t, t, clip_denoised)
        noise = torch.randn_like(x_t) if noise is None else noise
        noisy = (t != 0).float().view(-1, *[1] * (x_t.dim() - 1))
        return (found if mean is None else mean(found)) + noisy * (0.5 * log_variance).exp() * (deviation or 1) * noise

    return p_sample


def narrower_clip(self, model, x_t, t, clip_denoised=True):
    x_start = self.predict_start_from_noise(x_t, t, model(x_t, t))
    return self.q_posterior_mean_variance(x_start.clamp(-1, 1.5) if clip_denoised else x_start, x_t, t)


def predicts_x0(self, x_t, t, noise):
    return noise


def fails(self, x_t, t, noise):
    raise KeyError("alphas")


def from_one_timestep(self, x_t, t, noise):
    found = GaussianDiffusion.predict_start_from_noise(self, x_t, t, noise)
    return torch.where((t == 25).reshape(-1, *[1] * (x_t.dim() - 1)), found * 0.9, found)


OTHER_STEPS = {
    "clip": (narrower_clip, "p_mean_variance", "its p_sample gives .* at t = .*, where the tutorial's gives"),
    "prediction": (predicts_x0, "predict_start_from_noise", "its p_sample gives"),
    "one timestep": (from_one_timestep, "predict_start_from_noise", "its p_sample gives .* at t = 25, where"),
    "error": (fails, "predict_start_from_noise", "its p_sample raises KeyError: 'alphas'"),
    "temperature": (own_step(deviation=0.9), "p_sample", "its p_sample gives .* at t = 1, where"),
    "mean": (own_step(mean=lambda mean: mean * 1.001), "p_sample", "its p_sample gives .* at t = 0, where"),
    "dtype": (own_step(mean=lambda mean: mean.double()), "p_sample", "its p_sample gives torch.float64 of shape"),
    "shape": (own_step(mean=lambda mean: mean[None]), "p_sample", r"its p_sample gives torch.float32 of shape \(1, "),
    "noise before the model": (own_step(early=True), "p_sample", "its p_sample gives .* at t = 1, where"),
}


@pytest.mark.parametrize("kind", OTHER_STEPS)
def test_other_steps_run_as_they_are(kind):
    """A warning says why; torch's generator goes where the class's own code leads it."""
    method, name, why = OTHER_STEPS[kind]
    plain, fast = with_method(method, name)(50), accelerate(with_method(method, name)(50))
    outcomes = []
    for gd in (plain, fast):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes.append(gd.p_sample(lambda x, t: 0.3 * x, torch.ones(SHAPE), T))
        except KeyError:
            outcomes.append(torch.zeros(()))
        outcomes.append(torch.get_rng_state())
    assert torch.equal(outcomes[0], outcomes[2]) and torch.equal(outcomes[1], outcomes[3])
    assert re.search(why, fast.accelerated.fallbacks["p_sample"])


@own_code
def test_steps_are_tried_again_where_any_table_changes():
    """Also where the tutorial's steps don't read that table."""

    def p_sample(self, model, x_t, t, clip_denoised=True):
        mean = self.p_mean_variance(model, x_t, t, clip_denoised)[0]
        deviation = self._extract(self.posterior_variance, t, x_t.shape).sqrt()
        return mean + deviation * torch.randn_like(x_t)  # 0 at t = 0

    plain, model, x = with_method(p_sample)(50), Net(), torch.rand(SHAPE)
    fast = accelerate(plain)
    for factor in (1, 4):
        fast.posterior_variance = plain.posterior_variance = plain.posterior_variance * factor
        same(fast, plain, lambda gd: gd.p_sample(model, x, T))
        assert (fast.accelerated.fallbacks == {}) == (factor == 1)
    assert "its p_sample gives" in fast.accelerated.fallbacks["p_sample"]


def l1(self, model, x_start, t):
    noise = torch.randn_like(x_start)
    return F.l1_loss(noise, model(self.q_sample(x_start, t, noise=noise), t))


def noisier(self, x_start, t, noise=None):
    noise = torch.randn_like(x_start) if noise is None else noise
    return GaussianDiffusion.q_sample(self, x_start, t, noise * 1.1)


@own_code
def test_a_loss_calls_the_forward_process_of_a_subclass():
    """Also where only samples that no trial draws show the difference."""

    class Noisier(GaussianDiffusion):
        def q_sample(self, x_start, t, noise=None):
            return super().q_sample(x_start, t, noise) * (1.1 if x_start.amax() > 50 else 1.0)

    plain, model = Noisier(50), Net()
    x, t = 60 * torch.rand(SHAPE), torch.tensor([0, 5, 20, 49])
    same(accelerate(plain), plain, lambda gd: gd.train_losses(model, x, t))


def normalised(self, x_start, t, noise=None):
    return GaussianDiffusion.q_sample(self, x_start / x_start.std(), t, noise)


def flipped(self, x_start, t, noise=None):
    return GaussianDiffusion.q_sample(self, x_start.flip(2), t, noise)


@own_code
@pytest.mark.parametrize("method", [l1, noisier, normalised, flipped])
def test_another_loss_or_forward_process_stays_the_classs_own(method):
    """The steps are fused nevertheless."""
    name = "train_losses" if method is l1 else "q_sample"
    plain, model = with_method(method, name)(50), Net()
    x, t = torch.rand(SHAPE), torch.tensor([0, 5, 20, 49])
    fast = accelerate(plain)
    for call in (lambda d: d.train_losses(model, x, t), lambda d: d.q_sample(x, t), lambda d: d.p_sample(model, x, t)):
        _, state, their_state = same(fast, plain, call)
        assert torch.equal(state, their_state)
    expected = {"train_losses"} if name == "train_losses" else {"train_losses", "q_sample"}
    assert fast.accelerated.fallbacks.keys() == expected
    assert f"its {name} gives" in fast.accelerated.fallbacks[name]


BAD_TABLES = {
    "none": (lambda table: None, "is no tensor of float32 or float64"),
    "array": (lambda table: table.numpy(), "is no tensor of float32 or float64"),
    "half": (lambda table: table.half(), "is no tensor of float32 or float64"),
    "short": (lambda table: table[:-1], r"has shape \(49,\), no number a timestep"),
    "infinite": (lambda table: table / 0, r"the tutorial's class: its tables make no rows: .* expected finite numbers"),
}


def test_other_tables_are_refused():
    for change, why in BAD_TABLES.values():
        plain = GaussianDiffusion(50)
        plain.posterior_mean_coef2 = change(plain.posterior_mean_coef2)
        refused(TypeError, why, accelerate, plain)


@own_code
def test_a_table_that_becomes_half_is_the_classs_own():
    plain, model = GaussianDiffusion(50), Net()
    x, t = torch.rand(SHAPE), torch.tensor([0, 5, 20, 49])
    fast = accelerate(plain)
    fast.posterior_mean_coef2 = plain.posterior_mean_coef2 = plain.posterior_mean_coef2.half()
    same(fast, plain, lambda gd: gd.p_sample(model, x, t))
    assert fast.accelerated.fallbacks == {"p_sample": "its posterior_mean_coef2 is no tensor of float32 or float64"}
