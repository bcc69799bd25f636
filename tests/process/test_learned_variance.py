"""The model's own variance: steps and loops against Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021 in float64."""

import math

import pytest
import torch
from support.comparison import HALF_ULPS, check, float64, log_variance_of, normals, pair, step_magnitude, timesteps
from support.loop_cases import PART, SHAPE, TIMESTEPS, given, make_diffusion, model, ours, with_variance
from support.refusals import backends
from support.tutorial import Tutorial

from ddpm_ext import GaussianDiffusion, Guidance, Philox
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim, ddpm
from ddpm_ext.tables.variances import VARIANCES

variances = pytest.mark.parametrize("variance", [name for name, variance in VARIANCES.items() if variance.learned])


def make(device, backend, variance, prediction="eps"):
    """A diffusion, the tutorial's formulas for its mean, x, the two halves of a model's output, z and t."""
    gd, _ = pair(prediction, variance, backend)
    x, m, v, z = normals(4, device)
    v = {"learned": v - 3, "learned_range": v.clamp(-1, 1), "learned_variance": v.abs() * 0.1 + 1e-3}[variance]
    return gd, Tutorial(gd.betas, prediction, "fixed_small"), x, m, v, z, timesteps(device)


@backends
@variances
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_step(device, backend, variance, prediction, clip):
    gd, truth, x, m, v, z, t = make(device, backend, variance, prediction)
    asked = []

    def both(x_t, told):
        asked.append(told)
        return torch.cat([m, v], 1)

    mean, var, log_var = gd.p_mean_variance(both, x, t, clip)
    true_mean = truth.p_mean_variance(lambda *_: m, x, t, clip)[0]
    magnitude = step_magnitude(truth, x, m, t)
    check(mean, true_mean, magnitude, device)
    true_log = log_variance_of(gd, v, t)
    assert var.shape == log_var.shape == x.shape and var.dtype == log_var.dtype == torch.float32
    assert ((float64(log_var) - true_log).abs() <= 8 * HALF_ULPS * true_log.abs().clamp(min=1)).all()
    # The logarithm is above -20.
    assert ((float64(var) - true_log.exp()).abs() <= 10 * HALF_ULPS * 20 * true_log.exp()).all()

    result = gd.p_sample(both, x, t, clip, noise=z)
    moving = (t.cpu() != 0).reshape(-1, 1, 1, 1)
    spread = moving * (true_log / 2).exp()
    # the exponent is rounded twice, which is a relative error of the power
    size = magnitude + 2 * spread * float64(z).abs() * (1 + true_log.abs())
    check(result, true_mean + spread * float64(z), size, device)
    assert torch.equal(result[0], mean[0])  # no noise at t = 0
    assert torch.equal(gd.p_sample(both, x, 500, clip, noise=z), gd.p_sample(both, x, 500 + 0 * t, clip, noise=z))
    rng = Philox(4, torch.arange(6, device=device) * 2**33)
    drawn = gd.p_sample(both, x, t, clip, rng=rng, out=torch.empty_like(x))
    own = [Philox(4, i * 2**33, draw=int(told)) for i, told in enumerate(t)]
    noise = torch.cat([gd.ops.randn((1, *x.shape[1:]), each, device=device) for each in own])
    assert torch.equal(drawn, gd.p_sample(both, x, t, clip, noise=noise))
    assert not torch.equal(drawn[1:], mean[1:])
    assert torch.equal(asked[0], t)
    if backend == "fused":
        return
    wide = [y.double() for y in (x, m, v, z)]
    model = lambda *_: torch.cat(wide[1:3], 1)  # noqa: E731
    mean, var, log_var = gd.p_mean_variance(model, wide[0], t, clip)
    torch.testing.assert_close(log_var.cpu(), true_log, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(var.cpu(), true_log.exp(), rtol=1e-12, atol=0)
    result = gd.p_sample(model, wide[0], t, clip, noise=wide[3])
    torch.testing.assert_close(result.cpu(), mean.cpu() + spread * float64(z), rtol=0, atol=1e-12)


@backends
@variances
def test_other_samplers_leave_the_variance_and_tables_take_it(device, backend, variance):
    """ddim uses the first half of the channels only; ddpm's own table is as its name."""
    learned, plain = make_diffusion(backend=backend, variance=variance), make_diffusion(backend=backend)
    both = with_variance(variance)

    def loop(gd, model, **options):
        return gd.p_sample_loop(**ours(gd, "plain", model=model, device=device) | options, record="last")

    for sampler in ("ddim", "dpmpp_2m", "euler_ancestral"):
        expected = loop(plain, model, sampler=sampler)
        for own in (both, lambda x, t: torch.cat([model(x, t), x * float("nan")], 1)):
            assert torch.equal(loop(learned, own, sampler=sampler), expected)
    grid = make_grid(learned.alphas_cumprod, list(TIMESTEPS), betas=learned.betas)
    table = ddpm(grid, variance=variance)
    assert torch.equal(loop(learned, both, sampler=table, timesteps=None), loop(learned, both))
    implicit = {"sampler": ddim(grid, eta=1.0), "timesteps": None}
    assert torch.equal(loop(learned, both, **implicit), loop(plain, model, **implicit))


@backends
@variances
def test_guidance_takes_the_variance_of_the_conditional_output(device, backend, variance):
    """guided-diffusion's classifier-free loops: only the predictions of the two outputs are combined."""
    gd, conditional = make_diffusion(backend=backend, variance=variance), with_variance(variance)

    def unconditional(x, t):
        return torch.cat([0.5 * model(x, t), torch.full_like(x, 0.9)], 1)

    def guided(x, t):
        m, v = conditional(x, t).chunk(2, 1)
        u, _ = unconditional(x, t).chunk(2, 1)
        return torch.cat([u + 2.0 * (m - u), v], 1)

    def both(x, t):
        x, t = x.chunk(2)[0], t.chunk(2)[0]
        return torch.cat([unconditional(x, t), conditional(x, t)])

    def loop(model, guidance=None):
        return gd.p_sample_loop(**ours(gd, "plain", model=model, guidance=guidance, device=device), record="last")

    expected = loop(guided)
    for found in (loop(conditional, Guidance(2.0, unconditional)), loop(both, 2.0)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule, prediction", [("cosine", "eps"), ("flow", "flow")])
@variances
def test_a_samplers_own_table_reads_the_variance(schedule, prediction, variance):
    """Also for samples of another size, whose rows have a standard deviation of another size."""
    gd = GaussianDiffusion(5, schedule, prediction=prediction, variance=variance)
    table = gd.for_model(ddpm(gd.grid(), prediction=prediction, variance=variance))
    options = {"record": "last", "progress": False, "rng": Philox(0)}
    by_name, by_table = (
        gd.p_sample_loop(lambda x, t: torch.cat([0.3 * x, 0.01 + 0 * x], 1), SHAPE, sampler=sampler, **options)
        for sampler in ("ddpm", table)
    )
    assert torch.equal(by_name, by_table)


@pytest.mark.parametrize("own", ["fixed_small", "fixed_large", "learned_variance"])
@pytest.mark.parametrize("rows", ["learned", "learned_range"])
def test_rows_for_a_variance_that_the_model_does_not_predict_are_refused(own, rows):
    gd = make_diffusion(variance=own)
    table = ddpm(make_grid(gd.alphas_cumprod, list(TIMESTEPS), betas=gd.betas), variance=rows)
    message = rf"sampler has rows for the logarithm of .* \(l1\), but the variance is '{own}', expected 'learned' or"
    with pytest.raises(ValueError, match=message):
        gd.p_sample_loop(model, SHAPE, sampler=table, progress=False)


@backends
@variances
@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (4, 1, 3, 5), (4, 4, 3, 6), (2, 4, 3, 5), (4, 4)])
def test_an_output_without_twice_the_channels_is_refused(device, backend, variance, shape):
    gd = make_diffusion(backend=backend, variance=variance)
    x, output = given(0, PART, device, torch.float32), torch.zeros(shape, device=device)
    message = r"model_output has shape \(.*\), expected \(4, 4, 3, 5\), twice x_t's channels, where the variance is"
    options = {"progress": False, "device": device}
    for method, *arguments, how in (
        ("p_sample", x, 5, {}),
        ("p_mean_variance", x, 5, {}),
        ("p_sample_loop", SHAPE, options),
        ("p_sample_loop", SHAPE, {"sampler": "ddim", **options}),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(gd, method)(lambda *_: output, *arguments, **how)
    with pytest.raises(ValueError, match=r"x_t has shape \(4,\), expected \(batch, channels, ...\)"):
        gd.p_sample(lambda x, t: torch.cat([x, x]), x[:, 0, 0, 0], 5)  # there are no channels at all


@backends
def test_variances_beyond_float32_saturate_in_the_step_and_in_its_numbers(device, backend):
    """The step's standard deviation is in [e^-87, e^88], or in [2^-50, 2^50] where the model returns the variance."""
    x, z = torch.zeros(1, 1, 1, 4, device=device), torch.ones(1, 1, 1, 4, device=device)
    wild = torch.tensor([-500.0, 100.0, 176.0, 500.0], device=device).reshape(x.shape)
    for variance, logs in (
        ("learned", [-174.0, 100.0, 176.0, 176.0]),
        ("learned_variance", [-100 * math.log(2), math.log(100), math.log(176), math.log(500)]),
    ):
        gd, _ = pair("eps", variance, backend)

        def both(x, t):
            return torch.cat([torch.zeros_like(x), wild], 1)

        mean, var, log_var = gd.p_mean_variance(both, x, 500, False)
        torch.testing.assert_close(log_var.flatten().tolist(), logs, rtol=1e-6, atol=1e-6)
        assert var.isfinite().all()
        expected = torch.tensor(logs, dtype=torch.float64).exp().clamp(max=torch.finfo(torch.float32).max)
        torch.testing.assert_close(var.flatten().double().cpu(), expected, rtol=1e-4, atol=1e-45)
        step = gd.p_sample(both, x, 500, False, noise=z) - mean
        torch.testing.assert_close(step.double().cpu(), (log_var.double().cpu() / 2).exp(), rtol=1e-4, atol=1e-30)
