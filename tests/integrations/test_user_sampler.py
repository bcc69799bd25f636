"""Functions of somebody's own with k-diffusion's signature: they run as they are, or are proven in a first loop."""

import warnings
from itertools import pairwise

import pytest
import torch
from support.launches import launches

from ddpm_ext import Philox, randn
from ddpm_ext.integrations.k_diffusion import sampler

SIGMAS = torch.tensor([14.0, 6.0, 2.5, 1.0, 0.3, 0.0])
WIDE = (4, 8, 8, 8)


def bend(x, sigma, **_):
    """A denoiser that is not linear."""
    return torch.tanh(x / (1 + sigma.reshape(-1, *[1] * (x.dim() - 1))))


def ancestral(change):
    """A sampler with noise, which somebody changed: what it makes of the denoised sample first."""

    def own_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for now, after in pairwise(sigmas):
            m = change(model(x, now * x.new_ones(len(x)), **(extra_args or {})))
            z = torch.randn_like(x) if noise_sampler is None else noise_sampler(now, after)
            x = m + 0.6 * (x - m) * after / now + 0.8 * after * z
        return x

    return own_ancestral


def doubled(index):
    def change(m):
        m = m.clone()
        m[index] *= 2
        return m

    return change


LOG = []
# Whether rows can do it, and what it makes of the denoised sample.
OWN = {
    "as it is": (True, lambda m: m),
    "halved": (True, lambda m: 0.5 * m),
    "logged": (True, lambda m: LOG.append(float(m.mean())) or m),
    "channel": (False, doubled((slice(None), slice(3, 4)))),
    "column": (False, doubled((..., slice(5, 6)))),
    "sample": (False, doubled(slice(2, 3))),
    "fails on other samples": (False, doubled((slice(None), 3))),
    "width": (False, lambda m: 2 * m if m.shape[-1] >= 8 else m),
    "size": (False, lambda m: 2 * m if m.numel() > 1000 else m),
    "mean": (False, lambda m: m - m.mean()),
}


@pytest.mark.parametrize("trap", OWN)
@pytest.mark.parametrize("draws", [False, True])
def test_a_function_of_ones_own_is_proven_on_ones_own_samples(trap, draws):
    """Its first loop is its own, with the noise of the contract, and rows take the next ones where they agree."""
    is_row, change = OWN[trap]
    function, calls = ancestral(change), []
    if draws:  # by torch, and not by its noise_sampler
        inner = function
        function = lambda model, x, sigmas: inner(model, x, sigmas)  # noqa: E731
    x = 14 * torch.randn(WIDE, generator=torch.Generator().manual_seed(0))
    noises = iter([randn(WIDE, Philox(5), draw=draw) for draw in range(5)])
    expected = ancestral(change)(bend, x, SIGMAS, noise_sampler=lambda *_: next(noises))
    sample = sampler(function)
    with launches() as called, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(sample(bend, x, SIGMAS, rng=Philox(5)), expected)
        calls.append(len(called))
        for _ in range(2):
            found = sample(bend, x, SIGMAS, rng=Philox(5))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        calls.append(len(called) - calls[0])
    assert calls[1] == (10 if is_row else 0)


def test_why_a_function_runs_as_it_is():
    """Once for each reason; without a seed it then draws its own noise."""
    x = torch.randn(WIDE, generator=torch.Generator().manual_seed(0))
    for change, why in (
        (doubled((slice(None), slice(3, 4))), "own_ancestral runs as it is: step 0 differs from its rows by"),
        (lambda m: m * m, "own_ancestral runs as it is: step 0, at sigma 14, is not linear"),
    ):
        sample = sampler(ancestral(change))
        with pytest.warns(UserWarning, match=why) as caught:
            for _ in range(3):
                torch.manual_seed(0)
                found = sample(bend, x, SIGMAS)
        torch.manual_seed(0)
        assert torch.equal(found, ancestral(change)(bend, x, SIGMAS)) and len(caught) == 1


def test_each_object_looks_at_a_global_again():
    x = torch.randn(WIDE, generator=torch.Generator().manual_seed(0))
    for gain in (1.0, 0.5):
        LOG[:] = [gain]
        sample, function = sampler(ancestral(lambda m: LOG[0] * m)), ancestral(lambda m: LOG[0] * m)
        for _ in range(2):
            noises = iter([randn(WIDE, Philox(5), draw=draw) for draw in range(5)])
            expected = function(bend, x, SIGMAS, noise_sampler=lambda *_, noises=noises: next(noises))
            torch.testing.assert_close(sample(bend, x, SIGMAS, rng=Philox(5)), expected, rtol=1e-4, atol=1e-4)


class Denoiser(torch.nn.Module):
    gain = 1.0

    def forward(self, x, sigma, **_):
        return bend(x, sigma)


def asks_for_the_class(model, x, sigmas):
    gain = 1.0 if isinstance(model, Denoiser) and type(model).__name__ == "Denoiser" else 0.0
    return sum_of_steps(model, x, sigmas, gain)


def sum_of_steps(model, x, sigmas, gain):
    for now, after in pairwise(sigmas):
        m = gain * model(x, now * x.new_ones(len(x)))
        x = m + (x - m) * after / now
    return x


def asks_for_gradients(model, x, sigmas):
    return sum_of_steps(model, x, sigmas, 1.0 if torch.is_grad_enabled() else 0.5)


class Steps:
    gain = 1.0

    def sample(self, model, x, sigmas):
        return sum_of_steps(model, x, sigmas, self.gain)


@pytest.mark.filterwarnings("ignore:.* runs as it is")
def test_what_a_function_may_ask():
    """The class of its model, whether gradients are recorded, its object's attributes, and what it encloses."""
    x, steps, enclosed = torch.randn(WIDE, generator=torch.Generator().manual_seed(0)), Steps(), {"gain": 1.0}
    of_closure = lambda model, x, sigmas: sum_of_steps(model, x, sigmas, enclosed["gain"])  # noqa: E731
    for function in (asks_for_the_class, asks_for_gradients, steps.sample, of_closure):
        sample = sampler(function)
        for gain in (1.0, 0.5):
            steps.gain = enclosed["gain"] = gain
            for _ in range(2):
                expected = function(Denoiser(), x, SIGMAS)
                torch.testing.assert_close(sample(Denoiser(), x, SIGMAS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* runs as it is")
def test_arguments_that_a_function_passes_on_are_settings():
    def scaled(model, x, sigmas, extra_args=None):
        return sum_of_steps(model, x, sigmas, extra_args.get("scale", 1.0))

    x, sample = torch.randn(WIDE, generator=torch.Generator().manual_seed(0)), sampler(scaled)
    for given in ({}, {}, {"scale": 0.5}, {"scale": 0.5}, {"scale": 2.0}):
        expected = scaled(bend, x, SIGMAS, extra_args=given)
        torch.testing.assert_close(sample(bend, x, SIGMAS, extra_args=given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* runs as it is")
def test_a_model_that_returns_no_tensor_is_the_functions_own_affair():
    def of_dict(model, x, sigmas):
        return sum_of_steps(lambda *inputs: model(*inputs)["sample"], x, sigmas, 1.0)

    x = torch.randn(WIDE, generator=torch.Generator().manual_seed(0))
    model = lambda x, sigma: {"sample": bend(x, sigma)}  # noqa: E731
    for _ in range(2):
        assert torch.equal(sampler(of_dict)(model, x, SIGMAS), of_dict(model, x, SIGMAS))
