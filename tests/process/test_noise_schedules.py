"""Diffusions whose levels are pairs: rectified flow, sigma space, EDM, and pairs of no name."""

from __future__ import annotations

import math

import pytest
import torch
from support.choices import for_many

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.tables import predictions
from ddpm_ext.tables.schedules import NoiseSchedule, edm, flow, sigma_space

F64 = torch.float64
T = 20
SIGMAS = torch.linspace(math.log(0.02), math.log(60), T, dtype=F64).exp()
RISING = torch.linspace(0.05, 1, T, dtype=F64)
SCHEDULES = {
    "flow": lambda: "flow",
    "sigma space": lambda: sigma_space(SIGMAS),
    "edm": lambda: edm(SIGMAS, 0.4),
    "curved": lambda: NoiseSchedule(1.2 - RISING**2, RISING.sqrt()),
}
PREDICTIONS = ("eps", "x0", "v", "flow", "edm")
SHAPE = (4, 2, 3)


def normals(count, seed=0, device="cpu", dtype=F64):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=F64).to(device, dtype)


def each(values, t):
    return values[t].reshape(-1, 1, 1)


def test_flow_by_its_formulas(device):
    """x_t = (1 - sigma) x_0 + sigma z with sigma = (t + 1) / T; the model gets 1000 sigma and returns z - x_0. The
    kernels' steps are the reference's, which the next tests compare with those of other levels."""
    x_0, z, m = normals(3)
    t, found = torch.tensor([0, 7, 12, 19]), []
    sigma = each(torch.arange(1, T + 1, dtype=F64) / T, t)
    for backend, dtype in (("reference", F64), ("fused", torch.float32)):
        gd, asked = GaussianDiffusion(T, "flow", prediction="flow", backend=backend), []
        x, noise, output = (v.to(device, dtype) for v in (x_0, z, m))
        there, model = t.to(device), lambda x, t, asked=asked, output=output: asked.append(t) or output
        x_t = gd.q_sample(x, there, noise)
        loss = gd.train_losses(model, x, there, noise, reduction="none")
        mean, variance, _ = gd.p_mean_variance(model, x_t, there)
        posterior = gd.q_posterior_mean_variance(x, x_t, there)[0]
        results = x_t, loss, mean, variance, posterior, gd.p_sample(model, x_t, there, noise=noise)
        found.append([v.cpu().to(F64) for v in results])
        assert all(told.tolist() == [50, 400, 650, 1000] and told.device == device for told in asked)
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=3e-6)
    torch.testing.assert_close(found[0][0], (1 - sigma) * x_0 + sigma * z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0][1], ((m - (z - x_0)) ** 2).mean((1, 2)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_edm_by_table_1(device, monkeypatch, sigma_data):
    """The loss is lambda(sigma) |D(x_0 + sigma z; sigma) - x_0|^2, with lambda and D of Karras et al. 2022, table 1."""
    monkeypatch.setitem(predictions.PREDICTIONS, "mine", predictions.edm(sigma_data))
    name = "edm" if sigma_data == 0.5 else "mine"
    gd = GaussianDiffusion(T, edm(SIGMAS, sigma_data), prediction=name, backend="reference")
    x_0, z = normals(2, device=device)
    t = torch.tensor([0, 7, 12, 19], device=device)
    sigma = each(SIGMAS.to(device), t)
    seen = []

    def network(x, t):
        seen.append((x, t))
        return torch.sin(3 * x) + each(t, slice(None)).to(x)

    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in, c_noise = 1 / (sigma**2 + sigma_data**2).sqrt(), sigma.log() / 4
    x = x_0 + sigma * z
    denoised = c_skip * x + c_out * network(c_in * x, c_noise.flatten().float())
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    expected = (weight * (denoised - x_0) ** 2).mean((1, 2))
    torch.testing.assert_close(gd.train_losses(network, x_0, t, z, reduction="none"), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(seen[1][1], seen[0][1])
    if sigma_data == 0.5:
        same = gd.train_losses(network, x_0, t, z, reduction="none", weighting="edm")
        torch.testing.assert_close(same, expected, rtol=1e-9, atol=0)
    # The predicted clean sample is D.
    pred = gd.vlb_terms(network, x_0, t, noise=z, clip_denoised=False).pred_xstart
    torch.testing.assert_close(pred, denoised, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------- against the variance-preserving process


@for_many(40)
def test_every_method_is_the_variance_preserving_one_scaled(choose):
    """With r^2 = signal^2 + noise^2, samples x_t are r times those of a process by the same alphas_cumprod; losses and
    the terms of the likelihood are the same."""
    make = choose.one_of(list(SCHEDULES), "schedule")
    prediction = choose.one_of(PREDICTIONS, "prediction")
    names = ["fixed_small", "fixed_large", "learned", "learned_range", "learned_variance"]
    options = {"prediction": prediction, "variance": choose.one_of(names, "variance"), "backend": "reference"}
    ours = GaussianDiffusion(T, SCHEDULES[make](), **options)
    unit = GaussianDiffusion(T, ours.betas, **options)
    signal, noise = ours.schedule.signal, ours.schedule.noise
    r = torch.hypot(signal, noise)
    r_before = torch.cat([torch.ones(1, dtype=F64), r[:-1]])
    t = torch.tensor(choose.several(lambda: choose.integer(0, T - 2 if prediction == "eps" else T - 1), 4, 4, "t"))
    x_0, z, m, v = normals(4, choose.integer(0, 99, "seed"))
    x_0 = x_0.clamp(-1, 1)
    learned = options["variance"].startswith("learned")

    def model(x, t):
        return torch.cat([m, v.abs() if options["variance"] == "learned_variance" else v], 1) if learned else m

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)

    x_t = unit.q_sample(x_0, t, z)
    same(ours.q_sample(x_0, t, z), x_t * each(r, t))
    for method, arguments, scale in (
        ("q_mean_variance", lambda s: (x_0, t), r),
        ("q_posterior_mean_variance", lambda s: (x_0, x_t * s, t), r_before),
        ("p_mean_variance", lambda s: (model, x_t * s, t), r_before),
    ):
        found, expected = getattr(ours, method)(*arguments(each(r, t))), getattr(unit, method)(*arguments(1))
        same(found[0], expected[0] * each(scale, t))
        same(found[1], expected[1] * each(scale, t) ** 2)
        same(found[2], expected[2] + 2 * each(scale, t).log())
    same(ours.p_sample(model, x_t * each(r, t), t, noise=z), unit.p_sample(model, x_t, t, noise=z) * each(r_before, t))
    same(ours.predict_start_from_noise(x_t * each(r, t), t, z), unit.predict_start_from_noise(x_t, t, z))
    bounded = options["variance"] != "learned_variance" and not (prediction == "eps" and signal[-1] == 0)
    losses = [{"loss": "l1"}, *([{"loss": "vlb"}] if bounded else [])]
    for loss in losses if bounded or not learned else []:
        found, expected = (gd.train_losses(model, x_0, t, z, reduction="none", **loss) for gd in (ours, unit))
        same(found, expected)
    if learned and options["variance"] == "learned_variance":
        return
    found, expected = (gd.vlb_terms(model, x_0, t, noise=z) for gd in (ours, unit))
    same(found.output, expected.output)
    same(found.pred_xstart, expected.pred_xstart)


def test_prior_is_the_noise_that_a_loop_begins_from():
    """KL of the last level from normal samples of its own noise: 0 for flow; half the mean square of x_0 / sigma_max in
    sigma space."""
    x_0 = normals(1)[0].clamp(-1, 1)
    assert GaussianDiffusion(T, "flow", backend="reference").prior_bpd(x_0).tolist() == [0.0] * 4
    found = GaussianDiffusion(T, sigma_space(SIGMAS), backend="reference").prior_bpd(x_0)
    expected = (x_0**2).mean((1, 2)) / (2 * SIGMAS[-1] ** 2 * math.log(2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_input_perturbation_is_relative_to_the_noise():
    gd = GaussianDiffusion(T, sigma_space(SIGMAS))
    seen, zeros, rng = [], torch.zeros(SHAPE), Philox(3)
    gd.train_losses(lambda x, t: seen.append(x.clone()) or x, zeros, 11, rng=rng, input_perturbation=0.0)
    gd.train_losses(lambda x, t: seen.append(x.clone()) or x, zeros, 11, rng=rng, input_perturbation=0.5)
    more = randn(SHAPE, rng, stream=5, draw=11)
    torch.testing.assert_close(seen[1] - seen[0], (0.5 * SIGMAS[11]).float() * more, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*SCHEDULES, "integers"])
def test_what_the_model_is_called_with(name):
    """The schedule's own numbers, in single steps, in losses and in loops; elsewhere the timesteps, as integers."""
    schedule = SCHEDULES[name]() if name in SCHEDULES else sigma_space(SIGMAS, 50 + 3 * torch.arange(T))
    gd, told = GaussianDiffusion(T, schedule, prediction="x0"), []

    def model(x, t):
        told.append(t.clone())
        return 0 * x

    x = torch.zeros(2, 3)
    gd.p_sample(model, x, 5)
    gd.p_sample(model, x, torch.tensor([5, 5]))
    gd.train_losses(model, x, torch.tensor([5, 5]))
    gd.p_sample_loop(model, (2, 3), sampler="heun", timesteps=[19, 5, 0], progress=False, record="last")
    own = flow(T).timestep if schedule == "flow" else schedule.timestep
    own = torch.arange(T) if own is None else own.float() if own.is_floating_point() else own
    for t in told[:3]:
        assert t.dtype == own.dtype and t.tolist() == [own[5].item()] * 2
    first = [own[19]] if name == "flow" else [own[19], own[5]]  # from pure noise, Heun's method has no second half
    assert torch.stack(told[3:])[:, 0].tolist() == torch.stack([*first, own[5], own[0], own[0]]).tolist()


TWO, PAIR = torch.ones(2), torch.tensor([2.0, 3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NoiseSchedule([1.0], [1.0]), TypeError, "signal is a list, expected a tensor"),
        (lambda: NoiseSchedule(TWO, torch.ones(3)), ValueError, r"noise has shape \(3,\)"),
        (lambda: sigma_space(SIGMAS, lambda _, noise: noise[1:]), ValueError, "timestep returns a tensor of shape"),
        (lambda: NoiseSchedule(TWO, -TWO), ValueError, "noise reaches from -1.0"),
        (lambda: NoiseSchedule(TWO, torch.tensor([0.0, 1])), ValueError, r"noise\[0\] is 0.0 with signal"),
        (lambda: NoiseSchedule(TWO, torch.tensor([2.0, 1])), ValueError, r"noise\[1\] is 1.0 with"),
        (lambda: sigma_space(PAIR, torch.arange(3)), ValueError, r"timestep has shape \(3,\)"),
        (lambda: edm(PAIR, 0), ValueError, "sigma_data is 0, expected sigma_data > 0"),
        (lambda: edm(PAIR, "a"), TypeError, "sigma_data is 'a'"),
        (lambda: GaussianDiffusion(3, sigma_space(PAIR)), ValueError, "has 2 levels, expected 3"),
        (lambda: GaussianDiffusion(T, "flow", prediction="x_prev"), ValueError, "prediction is 'x_prev' with levels"),
        (lambda: GaussianDiffusion(3, 5), TypeError, "beta_schedule is a int, expected .* a NoiseSchedule"),
    ],
)
def test_schedules_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
