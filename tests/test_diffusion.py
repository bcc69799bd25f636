"""GaussianDiffusion against the tutorial's formulas in float64, and the tutorial's own code with the import swapped."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from tutorial import ATTRIBUTES, Tutorial

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.schedules import SCHEDULES

BACKENDS = ("fused", "reference")
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large")
SHAPE = (6, 3, 5, 7)
T = torch.tensor([0, 1, 17, 500, 998, 999])
# An operator rounds its coefficients, its products and its sums to float32: a few ulps of the terms' magnitude.
# Measured over all tests here: 2.6 half-ulps, factor 2.
HALF_ULPS = 5 * 2.0**-24

backends = pytest.mark.parametrize("backend", BACKENDS)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)
variances = pytest.mark.parametrize("variance", VARIANCES)
clips = pytest.mark.parametrize("clip", [True, False])


def normals(count, shape=SHAPE, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind(0)


def pair(prediction="eps", variance="fixed_small", backend="fused", schedule="linear"):
    gd = GaussianDiffusion(1000, schedule, prediction=prediction, variance=variance, backend=backend)
    return gd, Tutorial(gd.betas, prediction, variance)


def check(actual, expected, magnitude, dtype=torch.float32):
    """Within rounding of terms whose absolute values add up to `magnitude`."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    allowed = HALF_ULPS * magnitude
    if dtype != torch.float32:  # the result is rounded once more
        allowed = allowed + torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(dtype).smallest_normal
    assert ((actual.double() - expected).abs() <= allowed).all(), ((actual - expected).abs() / allowed).max()


def check_variances(actual, expected, batch=6, dims=4):
    """variance and log-variance: (batch, 1, ...), float32 numbers of the float64 ones."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == (batch, *[1] * (dims - 1))
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e.float(), rtol=2.0**-23, atol=0)


def start_magnitude(truth, x, m, t):
    """Of the terms of the predicted x_0."""
    if truth.prediction == "x0":
        return m.double().abs()
    if truth.prediction == "v":
        return x.double().abs() + m.double().abs()
    return truth.predict_start_from_noise(x.abs(), t, -m.abs())


def step_magnitude(truth, x, m, t, z=None):
    magnitude = truth.q_posterior_mean_variance(start_magnitude(truth, x, m, t), x.abs(), t)[0]
    return magnitude if z is None else magnitude + z.double().abs()


# ------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize("name", SCHEDULES)
def test_attributes(name):
    gd = GaussianDiffusion(1000, name)
    assert len(ATTRIBUTES) == 13
    # Without 1 - alphas_cumprod, which loses digits: by log1p and expm1.
    logs = np.log1p(-gd.betas.numpy())
    total = np.cumsum(logs)
    lost, lost_before = -np.expm1(total), np.r_[0, -np.expm1(total)[:-1]]
    before = np.exp(np.r_[0, total[:-1]])
    variance = gd.betas.numpy() * lost_before / lost
    expected = {
        "betas": gd.betas.numpy(),
        "alphas": np.exp(logs),
        "alphas_cumprod": np.exp(total),
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.exp(total / 2),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(lost),
        "log_one_minus_alphas_cumprod": np.log(lost),
        "sqrt_recip_alphas_cumprod": np.exp(-total / 2),
        "sqrt_recipm1_alphas_cumprod": np.exp(-total / 2) * np.sqrt(lost),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": gd.betas.numpy() * np.sqrt(before) / lost,
        "posterior_mean_coef2": np.exp(logs / 2) * lost_before / lost,
    }
    truth = Tutorial(gd.betas)
    for attribute in ATTRIBUTES:
        value = getattr(gd, attribute)
        assert value.dtype == torch.float64
        assert value.shape == (1000,)
        assert value.device.type == "cpu"
        # measured 6.3e-13, factor 5
        np.testing.assert_allclose(value.numpy(), expected[attribute], rtol=3e-12, atol=0, err_msg=attribute)
        np.testing.assert_allclose(value.numpy(), getattr(truth, attribute).numpy(), rtol=3e-12, err_msg=attribute)
    assert gd.timesteps == 1000


def test_given_betas():
    betas = torch.linspace(0.01, 0.3, 20)
    gd = GaussianDiffusion(20, betas)
    assert torch.equal(gd.betas, betas.double())
    betas.fill_(0.5)
    assert gd.betas[0] < 0.011


def test_defaults_are_the_tutorials():
    gd = GaussianDiffusion()
    assert gd.timesteps == 1000
    assert (gd.betas[0], gd.betas[-1]) == (1e-4, 0.02)
    assert GaussianDiffusion(timesteps=50, beta_schedule="cosine").betas.shape == (50,)


# ---------------------------------------------------------------------------------------------------- methods


@backends
def test_q_sample(backend):
    gd, truth = pair(backend=backend)
    x, z = normals(2)
    check(gd.q_sample(x, T, z), truth.q_sample(x, T, z), truth.q_sample(x.abs(), T, z.abs()))
    assert torch.equal(gd.q_sample(x, T, noise=z), gd.q_sample(x, T, z))


@backends
def test_q_mean_variance(backend):
    gd, truth = pair(backend=backend)
    (x,) = normals(1)
    mean, *rest = gd.q_mean_variance(x, T)
    expected, *expected_rest = truth.q_mean_variance(x, T)
    check(mean, expected, expected.abs())
    check_variances(rest, expected_rest)


@backends
def test_q_posterior_mean_variance(backend):
    gd, truth = pair(backend=backend)
    x_start, x_t = normals(2)
    mean, *rest = gd.q_posterior_mean_variance(x_start, x_t, T)
    expected, *expected_rest = truth.q_posterior_mean_variance(x_start, x_t, T)
    check(mean, expected, truth.q_posterior_mean_variance(x_start.abs(), x_t.abs(), T)[0])
    check_variances(rest, expected_rest)
    assert rest[1][0].item() == pytest.approx(np.log(1e-20))


@backends
def test_predict_start_from_noise(backend):
    gd, truth = pair(backend=backend)
    x, z = normals(2)
    expected = truth.predict_start_from_noise(x, T, z)
    check(gd.predict_start_from_noise(x, T, z), expected, truth.predict_start_from_noise(x.abs(), T, -z.abs()))


@backends
def test_predict_start_from_noise_inverts_q_sample(backend):
    gd, truth = pair(backend=backend)
    x, z = normals(2)
    x_t = gd.q_sample(x, T, z)
    magnitude = truth.predict_start_from_noise(x_t.abs(), T, -z.abs())
    check(gd.predict_start_from_noise(x_t, T, z), x.double(), 2 * magnitude)


@backends
@variances
@predictions
@clips
def test_p_mean_variance(backend, prediction, variance, clip):
    gd, truth = pair(prediction, variance, backend)
    x, m = normals(2)

    def model(x_t, t):
        assert x_t is x
        assert torch.equal(t, T)
        return m

    mean, *rest = gd.p_mean_variance(model, x, T, clip)
    expected, *expected_rest = truth.p_mean_variance(model, x, T, clip)
    check(mean, expected, step_magnitude(truth, x, m, T))
    check_variances(rest, expected_rest)
    keyword, *_ = gd.p_mean_variance(model, x, T, clip_denoised=clip)
    assert torch.equal(keyword, mean)
    if clip:
        assert torch.equal(gd.p_mean_variance(model, x, T)[0], mean)


@backends
@variances
@predictions
@clips
def test_p_sample(backend, prediction, variance, clip):
    gd, truth = pair(prediction, variance, backend)
    x, m, z = normals(3)

    def model(x_t, t):
        return m

    expected = truth.p_sample(model, x, T, clip, noise=z)
    result = gd.p_sample(model, x, T, clip, noise=z)
    check(result, expected, step_magnitude(truth, x, m, T, z))
    if clip:
        assert torch.equal(gd.p_sample(model, x, T, noise=z), result)
    # no noise at t = 0
    assert torch.equal(result[0], gd.p_mean_variance(model, x, T, clip)[0][0])


@backends
@pytest.mark.parametrize("name", ["cosine", "sigmoid", "scaled_linear"])
def test_p_sample_other_schedules(backend, name):
    gd, truth = pair(backend=backend, schedule=name)
    x, m, z = normals(3)
    result = gd.p_sample(lambda *_: m, x, T, noise=z)
    check(result, truth.p_sample(lambda *_: m, x, T, noise=z), step_magnitude(truth, x, m, T, z))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(backend, dtype):
    """Arithmetic is float32: the result is the exact one, rounded once."""
    gd, truth = pair(backend=backend)
    x, m, z = normals(3, dtype=dtype)
    result = gd.p_sample(lambda *_: m, x, T, noise=z)
    check(result, truth.p_sample(lambda *_: m, x, T, noise=z), step_magnitude(truth, x, m, T, z), dtype)
    check(gd.q_sample(x, T, z), truth.q_sample(x, T, z), truth.q_sample(x.abs(), T, z.abs()), dtype)
    full = x.float()
    result = gd.p_sample(lambda *_: m, full, T, noise=z.float())  # the model alone is of lower precision
    check(result, truth.p_sample(lambda *_: m, x, T, noise=z), step_magnitude(truth, x, m, T, z))


@predictions
def test_float64_through_the_reference(prediction):
    gd, truth = pair(prediction, backend="reference")
    x, m, z = normals(3, dtype=torch.float64)
    result = gd.p_sample(lambda *_: m, x, T, noise=z)
    assert result.dtype == torch.float64
    # measured 9e-15, factor 5
    torch.testing.assert_close(result, truth.p_sample(lambda *_: m, x, T, noise=z), rtol=0, atol=5e-14)
    mean, variance, log_variance = gd.q_posterior_mean_variance(x, m, T)
    assert (variance.dtype, log_variance.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(mean, truth.q_posterior_mean_variance(x, m, T)[0], rtol=0, atol=1e-14)


@backends
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 4, 2, 3), (0, 3), (3, 0)])
def test_any_number_of_dimensions(backend, shape):
    gd, truth = pair(backend=backend)
    x, m, z = normals(3, shape)
    t = torch.arange(shape[0]) * 300
    result = gd.p_sample(lambda *_: m, x, t, noise=z)
    check(result, truth.p_sample(lambda *_: m, x, t, noise=z), step_magnitude(truth, x, m, t, z))
    assert gd.q_mean_variance(x, t)[1].shape == (shape[0], *[1] * (len(shape) - 1))
    assert gd.q_sample(x, 5).shape == shape


@backends
@predictions
@pytest.mark.parametrize("t", [T, 0, 999], ids=["tensor", "0", "999"])
def test_train_losses(backend, prediction, t):
    gd, truth = pair(prediction, backend=backend)
    x, z = normals(2)
    w = torch.tensor(0.7)
    seen = []

    def model(x_t, t):
        seen.append((x_t, t))
        return w.to(x_t.dtype) * x_t

    loss = gd.train_losses(model, x, t, z)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    steps = T if t is T else torch.full((6,), t)
    assert torch.equal(seen[0][1], steps)
    assert torch.equal(seen[0][0], gd.q_sample(x, t, z))
    # measured 9.9e-8, factor 5
    torch.testing.assert_close(loss.double(), truth.train_losses(model, x, steps, noise=z), rtol=5e-7, atol=0)


@backends
@predictions
def test_train_losses_draws_one_noise(backend, prediction):
    """q_sample and the target see the same noise: stream 2, draw t."""
    gd, truth = pair(prediction, backend=backend)
    (x,) = normals(1)
    rng = Philox(7, 3)
    for t in (T, 400):
        draws = t.tolist() if t is T else [400] * 6
        z = torch.cat([ddpm_ext.randn((1, 3, 5, 7), Philox(7, 3 + i), stream=2, draw=d) for i, d in enumerate(draws)])
        expected = truth.train_losses(lambda x_t, _: 0.5 * x_t, x, torch.tensor(draws), noise=z)
        loss = gd.train_losses(lambda x_t, _: 0.5 * x_t, x, t, rng=rng)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


# ---------------------------------------------------------------------------------------------- t, noise, out


@backends
@pytest.mark.parametrize("t", [0, 1, 999])
def test_t_as_int_is_t_as_tensor(backend, t):
    gd, _ = pair(backend=backend)
    x, m, z = normals(3)
    many = torch.full((6,), t)
    rng = Philox(5)

    def model(x_t, t):
        assert t.dtype == torch.int64
        assert torch.equal(t, many)
        return m * (1 + t.float()[:, None, None, None])

    for options in ({"noise": z}, {"rng": rng}):
        assert torch.equal(gd.q_sample(x, t, **options), gd.q_sample(x, many, **options))
        assert torch.equal(gd.p_sample(model, x, t, **options), gd.p_sample(model, x, many, **options))
        assert gd.train_losses(model, x, t, **options) == gd.train_losses(model, x, many, **options)
    for one, other in (
        (gd.p_mean_variance(model, x, t), gd.p_mean_variance(model, x, many)),
        (gd.q_mean_variance(x, t), gd.q_mean_variance(x, many)),
        (gd.q_posterior_mean_variance(x, z, t), gd.q_posterior_mean_variance(x, z, many)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(gd.predict_start_from_noise(x, t, z), gd.predict_start_from_noise(x, many, z))


@backends
def test_rng_draws_what_randn_gives(backend):
    """p_sample: stream 0, draw t; q_sample: stream 2, draw t; a Philox's own come first."""
    gd, _ = pair(backend=backend)
    x, m = normals(2)
    randn = ddpm_ext.randn if backend == "fused" else ddpm_ext.reference.randn
    ids = torch.tensor([5, 2**56 - 1, 0, 7, 2**40, 1])
    steps = ((0, lambda **o: gd.p_sample(lambda *_: m, x, T, **o)), (2, lambda **o: gd.q_sample(x, T, **o)))
    for own in ({}, {"draw": 3}, {"stream": 77}, {"draw": 2**32 - 1, "stream": 255}):
        rng = Philox(2**64 - 1, ids, **own)
        for stream, step in steps:
            z = torch.cat(
                [
                    randn(
                        (1, *SHAPE[1:]),
                        Philox(2**64 - 1, ids[i : i + 1]),
                        stream=own.get("stream", stream),
                        draw=own.get("draw", T[i].item()),
                    )
                    for i in range(6)
                ]
            )
            assert torch.equal(step(rng=rng), step(noise=z))


@backends
def test_manual_seed_repeats(backend):
    gd, _ = pair(backend=backend)
    x, m = normals(2)
    for draw in (
        lambda: gd.q_sample(x, T),
        lambda: gd.p_sample(lambda *_: m, x, T),
        lambda: gd.train_losses(lambda x_t, _: x_t, x, T),
        lambda: gd.p_sample_loop(lambda *_: m, SHAPE, steps=2, record="last", progress=False),
    ):
        torch.manual_seed(1)
        first, second = draw(), draw()
        torch.manual_seed(1)
        assert torch.equal(draw(), first)
        assert not torch.equal(first, second)


def test_backends_draw_the_same_noise():
    fused, truth = pair()
    reference, _ = pair(backend="reference")
    x, m = normals(2)
    for draw in (lambda gd: gd.q_sample(x, T), lambda gd: gd.p_sample(lambda *_: m, x, T)):
        torch.manual_seed(2)
        one = draw(fused)
        torch.manual_seed(2)
        other = draw(reference)
        allowed = HALF_ULPS * 2 * step_magnitude(truth, x, m, T, torch.full_like(x, 5.0)) + 2e-6
        assert ((one - other).abs() <= allowed).all()


@backends
def test_out(backend):
    gd, _ = pair(backend=backend)
    x, m, z = normals(3)
    for step in (
        lambda x, **o: gd.q_sample(x, T, **o),
        lambda x, **o: gd.p_sample(lambda *_: m, x, T, **o),
    ):
        for options in ({"noise": z}, {"rng": Philox(1)}):
            expected = step(x, **options)
            buffer = torch.full_like(x, float("nan"))
            assert step(x, **options, out=buffer) is buffer
            assert torch.equal(buffer, expected)
            strided = torch.full((6, 7, 5, 3), float("nan")).permute(0, 3, 2, 1)
            assert step(x, **options, out=strided) is strided
            assert torch.equal(strided, expected)
            in_place = x.clone()
            version = in_place._version
            assert step(in_place, **options, out=in_place) is in_place
            assert torch.equal(in_place, expected)
            assert in_place._version > version


@backends
def test_arguments_stay(backend):
    gd, _ = pair(backend=backend)
    x, m, z = normals(3)
    copies = [v.clone() for v in (x, m, z, T)]
    gd.q_sample(x, T, z)
    gd.p_sample(lambda *_: m, x, T, noise=z)
    gd.p_mean_variance(lambda *_: m, x, T)
    gd.q_posterior_mean_variance(x, z, T)
    gd.predict_start_from_noise(x, T, z)
    gd.train_losses(lambda *_: m, x, T, z)
    assert all(torch.equal(a, b) for a, b in zip((x, m, z, T), copies, strict=True))


@backends
def test_model_output_with_sample(backend):
    """As diffusers' models give it."""
    gd, _ = pair(backend=backend)
    x, m, z = normals(3)
    plain, wrapped = (lambda *_: m), (lambda *_: SimpleNamespace(sample=m))
    assert torch.equal(gd.p_sample(wrapped, x, T, noise=z), gd.p_sample(plain, x, T, noise=z))
    assert torch.equal(gd.p_mean_variance(wrapped, x, T)[0], gd.p_mean_variance(plain, x, T)[0])
    assert gd.train_losses(wrapped, x, T, z) == gd.train_losses(plain, x, T, z)
    loop = [gd.p_sample_loop(f, SHAPE, steps=2, rng=Philox(0), record="last", progress=False) for f in (plain, wrapped)]
    assert torch.equal(*loop)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance_is_refused(variance):
    with pytest.raises(ValueError, match=f"variance is '{variance}'"):
        GaussianDiffusion(variance=variance)


def test_zero_terminal_snr():
    """Where alphas_cumprod is 0, x_0 is the sign of x_t - m: even when the two are close."""
    betas = torch.tensor([0.1, 0.2, 1.0])
    x = torch.tensor([[0.5, -0.3, 1.0, -2.0, 3.0]])
    m = torch.tensor([[0.25, 0.1, 1.0 - 2**-23, -2.0 - 2**-21, -3.0]])
    for backend in BACKENDS:
        gd = GaussianDiffusion(3, betas, backend=backend)
        mean, _, _ = gd.p_mean_variance(lambda *_: m, x, 2)
        # alphas[2] is 0: the mean is posterior_mean_coef1 * x_0 alone
        expected = gd.posterior_mean_coef1[2] * (x - m).double().sign()
        torch.testing.assert_close(mean.double(), expected, rtol=2.0**-22, atol=0)


@backends
def test_zero_terminal_snr_where_the_model_gives_x(backend):
    gd = GaussianDiffusion(3, torch.tensor([0.1, 0.2, 1.0]), backend=backend)
    x = torch.tensor([[0.1, -0.7, 3.3]])
    mean, _, _ = gd.p_mean_variance(lambda x_t, _: x_t.clone(), x, 2)
    assert (mean == 0).all()  # the sign of 0


# -------------------------------------------------------------------------------------------------- gradients


def gradients(function, tensors):
    leaves = [v.detach().clone().requires_grad_() for v in tensors]
    output = function(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    (output.double() * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


def check_gradients(ours, theirs, tensors):
    mine = gradients(ours, tensors)
    true = gradients(theirs, [v.double() for v in tensors])
    for a, b, v in zip(mine, true, tensors, strict=True):
        assert a.dtype == v.dtype
        # a product of two rounded numbers: measured 2.6 half-ulps, factor 2
        assert ((a.double() - b).abs() <= 5 * 2.0**-24 * b.abs()).all()


@backends
@pytest.mark.parametrize(
    "call",
    [
        lambda d, x, z: d.q_sample(x, T, z),
        lambda d, x, z: d.predict_start_from_noise(x, T, z),
        lambda d, x, z: d.q_posterior_mean_variance(x, z, T)[0],
    ],
    ids=["q_sample", "predict_start_from_noise", "q_posterior_mean_variance"],
)
def test_gradients_of_affine_methods(backend, call):
    gd, truth = pair(backend=backend)
    check_gradients(lambda x, z: call(gd, x, z), lambda x, z: call(truth, x, z), normals(2))


@backends
def test_gradient_of_q_mean_variance(backend):
    gd, truth = pair(backend=backend)
    check_gradients(lambda x: gd.q_mean_variance(x, T)[0], lambda x: truth.q_mean_variance(x, T)[0], normals(1))


@backends
@predictions
@clips
@pytest.mark.parametrize("t", [T, 20], ids=["tensor", "int"])
def test_gradients_of_p_mean_variance(backend, prediction, clip, t):
    """In x_t, directly and through the model, and in the model's parameters."""
    gd, truth = pair(prediction, backend=backend)
    (x,) = normals(1)
    w = torch.tensor(0.9)
    steps = T if t is T else torch.full((6,), t)

    def run(d, t, x, w):
        return d.p_mean_variance(lambda x_t, _: w * x_t + 0.1 * x_t**2, x, t, clip)[0]

    mine, mine_w = gradients(lambda x, w: run(gd, t, x, w), (x, w))
    true, true_w = gradients(lambda x, w: run(truth, steps, x, w), (x.double(), w.double()))
    largest = gradient_terms(truth, steps, x, w)
    # measured 2.4 half-ulps of the terms, factor 3
    assert ((mine.double() - true).abs() <= 8 * 2.0**-24 * largest).all(), ((mine - true).abs() / largest).max() * 2**24
    terms = (largest * x.abs()).sum()
    # measured 0.06 half-ulps (rounding averages out), factor 8
    assert abs(mine_w.double() - true_w) <= 0.5 * 2.0**-24 * terms


def gradient_terms(truth, t, x, w):
    """A bound of the terms of the mean's gradient in x_t: |c0| (|a| + |b| |dm/dx|) + |c1|."""
    slope = w.abs() + 0.2 * x.double().abs()
    ones = torch.ones_like(x).double()
    start = start_magnitude(truth, ones, slope, t)
    return truth.q_posterior_mean_variance(start, ones, t)[0]


@backends
def test_p_sample_builds_no_graph(backend):
    gd, _ = pair(backend=backend)
    x, m, z = (v.requires_grad_() for v in normals(3))
    w = nn.Parameter(torch.tensor(0.5))
    graphs = []

    def model(x_t, t):
        graphs.append((w * m).requires_grad)
        return w * m

    result = gd.p_sample(model, x, T, noise=z)
    assert not result.requires_grad
    assert result.grad_fn is None
    assert graphs == [False]
    assert torch.is_grad_enabled()


@backends
def test_loop_builds_no_graph(backend):
    gd, _ = pair(backend=backend)
    w = nn.Parameter(torch.tensor(0.5))
    result = gd.p_sample_loop(lambda x_t, _: w * x_t, (2, 3), steps=2, record="last", progress=False)
    assert not result.requires_grad
    assert gd.p_mean_variance(lambda x_t, _: w * x_t, result, 3)[0].requires_grad


# -------------------------------------------------------------------------------------------- the tutorial's cells


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.embedding = nn.Embedding(500, 3)
        nn.init.zeros_(self.embedding.weight)

    def forward(self, x, t):
        return self.convolution(x) + self.embedding(t)[:, :, None, None]


@backends
def test_training_loop(backend):
    timesteps, batch_size, device = 500, 8, "cpu"
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    gaussian_diffusion = GaussianDiffusion(timesteps=timesteps, backend=backend)
    losses = []
    for _ in range(30):
        images = torch.zeros(batch_size, 3, 8, 8).to(device)
        optimizer.zero_grad()
        t = torch.randint(0, timesteps, (batch_size,), device=device).long()
        loss = gaussian_diffusion.train_losses(model, images, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # With images of 0 the noise is x_t / sqrt(1 - alphas_cumprod): a model that is linear in x_t learns most of it.
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


@backends
@predictions
def test_parameter_gradients_of_train_losses(backend, prediction):
    gd = GaussianDiffusion(500, prediction=prediction, backend=backend)
    truth = Tutorial(gd.betas, prediction)
    torch.manual_seed(0)
    model, exact = TinyModel(), TinyModel().double()
    exact.load_state_dict(model.state_dict())
    x, z = normals(2, (4, 3, 8, 8))
    t = torch.tensor([0, 3, 250, 499])
    gd.train_losses(model, x, t, z).backward()
    truth.train_losses(exact, x, t, noise=z).backward()
    for a, b in zip(model.parameters(), exact.parameters(), strict=True):
        # measured 3.3e-7 of the largest, factor 3
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=1e-6 * b.grad.abs().max().item())


@backends
def test_sampling_cell(backend):
    timesteps = 500
    model = TinyModel()
    gaussian_diffusion = GaussianDiffusion(timesteps=timesteps, backend=backend)
    steps = timesteps if backend == "fused" else 4
    if backend == "fused":
        generated_images = gaussian_diffusion.sample(model, 8, batch_size=64, channels=3)
    else:
        generated_images = gaussian_diffusion.sample(model, 8, batch_size=64, channels=3, steps=steps)
    assert isinstance(generated_images, list)
    assert len(generated_images) == steps
    for images in generated_images:
        assert isinstance(images, np.ndarray)
        assert images.shape == (64, 3, 8, 8)
        assert images.dtype == np.float32
    assert np.isfinite(generated_images[-1]).all()
    assert np.abs(generated_images[-1]).max() <= 1  # the last step is x_0 alone, clipped
    assert generated_images[-1].reshape(8, 8, 3, 8, 8).shape == (8, 8, 3, 8, 8)
    # the afterword's cell: x_0 as predicted on the way
    t = torch.full((64,), timesteps - 1).long()
    ori = torch.from_numpy(generated_images[0])
    with torch.no_grad():
        pred_noise = model(ori, t)
        x_recon = gaussian_diffusion.predict_start_from_noise(ori, t, pred_noise).to("cpu").numpy()
    assert x_recon.shape == (64, 3, 8, 8)


def test_sample_defaults():
    gd = GaussianDiffusion(20)
    images = gd.sample(lambda x_t, _: x_t, 4, steps=2, progress=False)
    assert [v.shape for v in images] == [(8, 3, 4, 4)] * 2
    positional = gd.sample(lambda x_t, _: x_t, 4, 2, 1, steps=2, progress=False, record="last", dtype=torch.float16)
    assert positional.shape == (2, 1, 4, 4)
    assert positional.dtype == torch.float16
