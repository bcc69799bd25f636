"""StepTable.trace of functions that run their own loop, as k-diffusion's do: what is found, and what refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.gaussian import loop
from support.refused import refused

from ddpm_ext import StepTable

SIGMAS = [14.0, 6.0, 2.5, 1.0, 0.3, 0.0]


def slope(model, x, sigma):
    return (x - model(x, sigma * x.new_ones(len(x)))) / sigma


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i, (now, after) in enumerate(pairwise(sigmas)):
        x = x + slope(model, x, now) * (after - now)
        if callback is not None:
            callback({"i": i})
    return x


def churned(model, x, sigmas, s_churn=0.5):
    """Adds noise before each step, also the first, by torch.randn_like."""
    for now, after in pairwise(sigmas):
        hat = now * (1 + s_churn)
        torch.randn_like(x)  # a draw that nothing uses
        x = x + torch.randn_like(x) * (hat**2 - now**2).sqrt()
        x = x + slope(model, x, hat) * (after - hat)
    return x


def multistep(seed):
    """Any linear function of sample, output, noise and the last three outputs, other in each step."""
    weights = torch.empty(len(SIGMAS), 6, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))

    def function(model, x, sigmas, noise_sampler=None):
        kept = []
        for own, now in zip(weights, sigmas[:-1], strict=False):
            m = model(x, now * x.new_ones(len(x)))
            x = own[0] * x + own[1] * m + own[2] * noise_sampler(now, now)
            x = x + sum(weight * tensor for weight, tensor in zip(own[3:], kept, strict=False))
            kept = [m, *kept][:3]
        return x

    return function


def own_loop(function, x, outputs, drawn, used, monkeypatch):
    """The function's own result, and those of its draws that it uses, as `used` says."""
    outputs, seen = iter(outputs), []

    def draw(*_):
        seen.append(drawn[len(seen)])
        return seen[-1]

    monkeypatch.setattr(torch, "randn_like", draw)
    options = {"noise_sampler": draw} if "noise_sampler" in function.__code__.co_varnames else {}
    if "callback" in function.__code__.co_varnames:
        options["callback"] = lambda _: None
    result = function(lambda x, sigma: next(outputs), x, torch.tensor(SIGMAS, dtype=torch.float64), **options)
    return result.numpy(), [z.numpy() for i, z in enumerate(seen) if used(i)]


FUNCTIONS = [euler, churned, multistep(0), multistep(1), multistep(2)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_rows_are_the_function(function, monkeypatch):
    table = StepTable.trace(function, SIGMAS)
    x, *numbers = torch.randn(30, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    used = (lambda i: i % 2 == 1) if function is churned else (lambda i: True)
    expected, noise = own_loop(function, x, numbers[:9], numbers[9:], used, monkeypatch)
    outputs = iter(numbers)
    *_, (_, _, found) = loop(table, x.numpy(), lambda row, x: next(outputs).numpy(), iter(noise))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert ((table.a == 0) & ((table.b == 1) | (table.b == 0))).all()  # the output is the clean sample


def test_columns_of_euler():
    table = StepTable.trace(euler, torch.tensor(SIGMAS))
    now, after = (torch.tensor(SIGMAS, dtype=torch.float64)[where] for where in (slice(None, -1), slice(1, None)))
    now, after = now.float().double(), after.float().double()
    expected = {"timestep": now, "b": torch.ones(5), "c0": 1 - after / now, "c1": after / now, "draw": torch.arange(5)}
    expected |= {"signal_now": torch.ones(5), "noise_now": now, "signal_after": torch.ones(5), "noise_after": after}
    for name, values in expected.items():
        torch.testing.assert_close(getattr(table, name).double(), values.double(), rtol=1e-14, atol=1e-15)
    assert table.plain and not table.s.any()


def test_noise_before_the_first_call_is_a_row_without_the_model():
    table = StepTable.trace(churned, SIGMAS)
    assert len(table) == len(SIGMAS) and table.plain
    first = table[0]
    assert (first.a, first.b, first.c0, first.c1, first.c2) == (0, 0, 0, 1, 0)
    assert first.s == pytest.approx(14 * 1.25**0.5, rel=1e-14) and first.noise_after == table[1].timestep == 21
    assert (table.s[:-1] > 0).all() and table.s[-1] == 0
    whole = StepTable.trace(multistep(0), [4, 2, 1, 0])
    assert whole.timestep.tolist() == [4.0, 2.0, 1.0] and whole.draw.tolist() == [0, 1, 2]
    assert StepTable.trace(lambda model, x, sigmas: euler(lambda x, s: model(x.clone(), s), x, sigmas), SIGMAS).plain
    half = StepTable.trace(churned, SIGMAS, s_churn=0.2)  # further arguments are the function's
    assert half[1].timestep == pytest.approx(16.8)


def four(model, x, sigmas):
    kept = []
    for i, now in enumerate(sigmas[:-1]):
        kept.append(model(x, now * x.new_ones(len(x))))
        x = sum(m / (1 + i + j) for j, m in enumerate(kept))
    return x


def until_small(model, x, sigmas):
    for _ in range(50):
        x = 0.5 * x + 0.1 * model(x, sigmas[0] * x.new_ones(len(x)))
        if x.abs().max() < 0.3:
            break
    return x


def with_square(model, x, sigmas):
    for i, now in enumerate(sigmas[:-1]):
        m = model(x, now * x.new_ones(len(x)))
        x = 0.5 * x + m + (m * m if i == 2 else 0)
    return x


def confides(model, x, sigmas, extra_args=None):
    extra_args["report"] = lambda _: None
    return model(x, sigmas[:1], **extra_args)


def uniform(model, x, sigmas):
    return model(x, sigmas[:1]) + torch.rand_like(x)


def of_random_size(model, x, sigmas):
    return model(x, sigmas[:1]) * (1 + torch.rand(()))


def test_what_is_no_table():
    for function, message in (
        (with_square, "step 2, at sigma 2.5, is not linear: .* differ by"),
        (four, "step 5, at sigma 0.2, reads more of the steps before it than the 3 tensors"),
        (until_small, "the model is called (more|fewer) than .* times for other samples, on which the steps depend"),
        (lambda model, x, sigmas: x, "the model is never called"),
        (lambda model, x, sigmas: (model(x, sigmas[:1]), 3), "the function returns a tuple, expected the samples"),
        (confides, "the model is called with report, expected no arguments but those of extra_args"),
        (uniform, "step 0, at sigma 14, is not linear: .* differ by"),
        (of_random_size, "step 0, at sigma 14, is not linear: .* differ by"),
    ):
        refused(ValueError, message, StepTable.trace, function, [*SIGMAS[:-1], 0.2, 0.1, 0.0])


def test_arguments_are_checked():
    for sigmas, message in (
        ([1.0], r"sigmas has shape \(1,\), expected \(levels,\) with at least 2"),
        ([[2.0, 1.0]], r"sigmas has shape \(1, 2\)"),
        ([1.0, float("nan")], "expected finite numbers >= 0"),
        ([1.0, -1.0], "sigmas reaches from -1.0 to 1.0"),
    ):
        refused(ValueError, message, StepTable.trace, euler, sigmas)
    with pytest.raises(TypeError, match=r"is a function of model, x, sigma_min .*, expected one of model, x and"):
        StepTable.trace(lambda model, x, sigma_min, sigma_max: x, SIGMAS)
    refused(TypeError, "scheduler is a int, expected an object with set_timesteps", StepTable.trace, 3, 10)


def test_it_leaves_the_generator_alone_and_runs_on_the_cpu_whatever_the_default_device():
    torch.manual_seed(0)
    expected, drawn = StepTable.trace(churned, SIGMAS), torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(3))
    with torch.device("meta"):
        assert StepTable.trace(churned, SIGMAS) == expected
