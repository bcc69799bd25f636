"""k-diffusion's sampling functions: as tables, and beside ours of the same signature, over whole loops.

Of a checkout (support/checkouts.py) k_diffusion/sampling.py is read.
"""

from __future__ import annotations

import inspect
import math
import sys
import types

import pytest
import torch
from support.checkouts import checkout, missing
from support.choices import for_many

from ddpm_ext import StepTable
from ddpm_ext.integrations.k_diffusion import sampler

CHECKOUT = checkout("k-diffusion")
SHAPE = (2, 3, 4)
OURS = [
    ("euler", {}),
    ("euler", {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.01}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5, "s_noise": 0.9}),
    ("heun", {}),
    ("heun", {"s_churn": 3.0, "s_tmin": 1.0, "s_noise": 1.01}),
    ("dpm_2", {}),
    ("dpm_2", {"s_churn": 3.0, "s_tmin": 1.0, "s_noise": 1.01}),
    ("dpm_2_ancestral", {}),
    *(("dpm_2_ancestral", {"eta": eta, "s_noise": 0.9}) for eta in (0.0, 0.5)),
    ("dpmpp_2s_ancestral", {}),
    *(("dpmpp_2s_ancestral", {"eta": eta, "s_noise": 0.9}) for eta in (0.0, 0.5)),
    *(("lms", {"order": order}) for order in (2, 3, 4)),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.3, "s_noise": 1.1, "solver_type": "midpoint"}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.4}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
]
# Functions, and how many tensors of history their rows read.
TRACED = [
    ("euler", {"s_churn": 3.0}, 0),
    ("euler_ancestral", {}, 0),
    ("heun", {"s_churn": 3.0}, 1),
    ("dpm_2", {"s_churn": 3.0, "s_tmin": 1.0}, 1),
    ("dpm_2_ancestral", {}, 1),
    ("lms", {}, 3),
    ("dpmpp_2s_ancestral", {}, 1),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.4}, 1),
    ("dpmpp_2m", {}, 1),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, 1),
    ("dpmpp_3m_sde", {}, 2),
]


@pytest.fixture(scope="module")
def sampling():
    """The module k_diffusion.sampling without what it imports beside torch, scipy and tqdm, which no sampler needs."""
    if CHECKOUT is None:
        pytest.skip(missing("k-diffusion"))
    pytest.importorskip("scipy")
    package = "checkout.k_diffusion"  # as a copy in another program
    names = ("checkout", package, "torchdiffeq", "torchsde", f"{package}.utils")
    absent = [name for name in names if name.startswith("checkout") or name not in sys.modules]
    stand_ins = {name: types.ModuleType(name) for name in absent}
    if "torchdiffeq" in stand_ins:
        stand_ins["torchdiffeq"].odeint = None
    module = types.ModuleType(f"{package}.sampling")
    module.__package__ = package
    utils = stand_ins[package].utils = stand_ins[f"{package}.utils"]
    utils.append_dims = lambda x, dims: x[(..., *[None] * (dims - x.ndim))]
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        exec((CHECKOUT / "k_diffusion" / "sampling.py").read_text(), module.__dict__)
    return module


def schedules(sampling):
    """To clean data, and from the middle to a level that is not clean."""
    levels = sampling.get_sigmas_karras(20, 0.03, 14.6)
    return sampling.get_sigmas_karras(6, 0.03, 14.6), levels[3:-1]


def normal(seed, *shape):
    return torch.empty(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


class Denoiser:
    """Any function of x and sigma, which keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, scale=1.0):
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
        self.calls.append((x.clone(), sigma.clone()))
        mixed = torch.einsum("ij,bjk->bik", 0.3 * normal(7, 3, 3).to(x.dtype), x)
        return torch.tanh(mixed / (1 + sigma[:, None, None])) * scale


class Noise:
    """Draws in order, of which those are kept that the loop uses, with the sigmas that it asked for."""

    def __init__(self, dtype, used=None):
        self.dtype, self.used = dtype, used
        self.drawn = []

    def __call__(self, *asked):
        self.drawn.append((normal(100 + len(self.drawn), *SHAPE).to(self.dtype), asked))
        return self.drawn[-1][0]

    def again(self):
        used = iter([z for i, z in enumerate(self.drawn) if self.used is None or self.used[i]])

        def drawn(*asked):
            z, expected = next(used)
            if len(expected) == 2:  # by a noise sampler
                torch.testing.assert_close(torch.stack(asked), torch.stack(expected))
            return z

        return drawn


def both(sampling, monkeypatch, name, options, sigmas, dtype, ours):
    """k-diffusion's loop and ours with the same noise: results, calls of the model, and callbacks."""
    function = getattr(sampling, f"sample_{name}")
    x, sigmas = (normal(1, *SHAPE) * sigmas[0]).to(dtype), sigmas.to(dtype)
    churn = options.get("s_churn", 0.0)
    low, high = options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)
    takes_sampler = "noise_sampler" in inspect.signature(function).parameters
    # Functions with churn draw in each step, and use it in some.
    noise = Noise(dtype, None if takes_sampler else [churn > 0 and low <= s <= high for s in sigmas[:-1].tolist()])

    def run(sample, **arguments):
        model, told = Denoiser(), []
        arguments |= {"extra_args": {"scale": 1.3}, "callback": told.append, "disable": True}
        return sample(model, x, sigmas, **arguments, **options), model.calls, told

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", noise)
        expected = run(function, **({"noise_sampler": noise} if takes_sampler else {}))
    return expected, run(ours, noise_sampler=noise.again())


def check(found, tolerance):
    (expected, calls, told), (result, own_calls, own_told) = found
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    assert len(calls) == len(own_calls)
    for (x, sigma), (own_x, own_sigma) in zip(calls, own_calls, strict=True):
        torch.testing.assert_close(own_sigma, sigma, rtol=max(tolerance, 1e-14), atol=0)
        torch.testing.assert_close(own_x, x, rtol=tolerance, atol=tolerance * float(x.abs().max()))
    assert len(told) == len(own_told)
    for theirs, own in zip(told, own_told, strict=True):
        assert own.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"} and own["i"] == theirs["i"]
        for name in ("x", "sigma", "sigma_hat", "denoised"):
            size = float(theirs["x"].abs().max()) if name == "x" else 1 + float(theirs[name].abs().max())
            torch.testing.assert_close(own[name], theirs[name], rtol=tolerance, atol=tolerance * size)


dtypes = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-13), (torch.float32, 3e-6)], ids=str)


@dtypes
@pytest.mark.parametrize("name, options", OURS)
def test_our_rows(sampling, monkeypatch, name, options, dtype, tolerance):
    """Each call of the model and each callback is the same, and so is the result."""
    for sigmas in schedules(sampling):
        check(both(sampling, monkeypatch, name, options, sigmas, dtype, sampler(name)), tolerance)


@for_many(30)
def test_any_options(sampling, choose):
    name, options = choose.one_of(OURS, "of")
    few = {"eta": [0.0, 0.3, 1.0], "s_noise": [0.9, 1.0, 1.02], "s_churn": [0.0, 2.0, 50.0], "s_tmin": [0.0, 0.7]}
    options = {key: choose.one_of(few.get(key, [value]), key) for key, value in options.items()}
    lowest, rho = choose.one_of([0.01, 0.4], "lowest"), choose.one_of([1.0, 3.0, 7.0], "rho")
    sigmas = sampling.get_sigmas_karras(choose.integer(2, 12, "steps"), lowest, choose.one_of([2.0, 80.0], "top"), rho)
    sigmas = sigmas[: choose.one_of([None, -1], "end")].double()
    found = both(sampling, pytest.MonkeyPatch, name, options, sigmas, torch.float64, sampler(name))
    check(found, 1e-8)  # of a long step, k-diffusion makes sigma_down as the root of a difference


@dtypes
@pytest.mark.parametrize("name, options, history", TRACED)
def test_traced_rows(sampling, monkeypatch, name, options, history, dtype, tolerance):
    function = getattr(sampling, f"sample_{name}")
    for sigmas in schedules(sampling):
        check(both(sampling, monkeypatch, name, options, sigmas, dtype, sampler(function)), tolerance)
        table = StepTable.trace(function, sigmas, **options)
        assert sum(bool((column != 0).any()) for column in (table.h1, table.h2, table.h3)) == history


def test_solvers_of_fixed_steps(sampling):
    """DPM-Solver-fast chooses its own sigmas, but its steps are linear, in log sigmas that it computes in float32."""

    def fast(model, x, sigmas, **options):
        return sampling.sample_dpm_fast(model, x, float(sigmas[1]), float(sigmas[0]), 7, **options)

    table = StepTable.trace(fast, [14.6, 0.1])
    outputs = normal(3, 7, *SHAPE)
    calls = iter(outputs)
    expected = fast(lambda x, sigma: next(calls), normal(4, *SHAPE), [14.6, 0.1], disable=True)
    calls = iter(outputs)
    again = sampler(fast)(lambda x, sigma: next(calls), normal(4, *SHAPE), torch.tensor([14.6, 0.1]), disable=True)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    assert len(table) == 7


def test_every_function_is_tried(sampling):
    """A new one of a new checkout shows up here."""
    found = {name.removeprefix("sample_") for name in vars(sampling) if name.startswith("sample_")}
    assert found == {name for name, *_ in TRACED} | {"dpm_fast", "dpm_adaptive"}


def test_names_of_an_installed_k_diffusion(sampling, monkeypatch):
    with pytest.raises(ValueError, match=r"sampler is 'dpmpp_sde', expected .*'dpmpp_2m_sde'.* or with k-diff"):
        sampler("dpmpp_sde")
    monkeypatch.setitem(sys.modules, "k_diffusion", sampling)
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", sampling)
    found = sampler("dpmpp_sde")
    own, theirs = inspect.signature(found), inspect.signature(sampling.sample_dpmpp_sde)
    assert found.__name__ == "sample_dpmpp_sde"
    shared = [name for name in theirs.parameters if name != "noise_sampler"]
    assert [name for name in own.parameters if name in shared] == shared
    assert {"rng", "noise_sampler"} <= own.parameters.keys()


@pytest.mark.parametrize("name", sorted({name for name, _ in OURS}))
def test_signatures(sampling, name):
    """Arguments by their place or by name, with the same defaults."""
    own = inspect.signature(sampler(name)).parameters
    theirs = inspect.signature(getattr(sampling, f"sample_{name}")).parameters
    shared = {key: each.default for key, each in theirs.items()}
    assert {key: own[key].default for key in shared} == shared
    assert list(own)[:6] == list(theirs)[:6]
