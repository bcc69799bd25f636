"""The extended step and its twin in `reference` against float64, and what each option must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.choices import Choose, for_many
from support.devices import moved
from support.extended import COLUMNS, LIKE_X, PER_SAMPLE, RESULTS, make_row, make_table, options
from support.operators import CLIPS, DTYPES, NOISE_ERROR, Inputs, columns, each, host
from support.rounding import Number, roundings, same_bits

from ddpm_ext import Philox, ops, randn, reference

F32 = torch.float32
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
PAIRS = pytest.mark.parametrize(("dtype", "model_dtype"), DTYPES)
# The error is counted in roundings of the sum of the terms' absolute values, as in test_ops.py. Measured worst of
# 9,000 examples: fused 2.44, reference 2.99; the margin is 1.7.
ROUNDINGS = 5
INF, NAN = math.inf, math.nan


# ------------------------------------------------------------------------------------------------- against float64


def formula(x, m, z, row, given, log_variance, clip) -> tuple[Number, Number, np.ndarray]:
    """prev and x0 by the equation of ops.extended_step, and the factor of each normal. `row` has numbers by column."""
    row = {name: Number(row[name]) for name in COLUMNS}
    x, zero, one = Number(x), Number(np.zeros_like(x)), Number(np.ones_like(x))
    given = {name: Number(value) for name, value in given.items()}
    m = zero if m is None else Number(m)
    if "uncond_output" in given:
        m = given["uncond_output"] + row["w"] * (m - given["uncond_output"])
    m = m * given.get("output_scale", one)
    x0 = (given["x_start"] if "x_start" in given else row["a"] * x + row["b"] * m) * given.get("x_start_scale", one)
    if clip is not None:
        x0 = x0.clip(*clip)
    deviation = one
    if "model_variance" in given:
        v = given["model_variance"]
        if log_variance:
            log = row["l0"] + row["l1"] * v
            # an absolute error of the exponent is a relative error of the power
            deviation = Number(np.exp(log.value), np.exp(log.value) * (1 + log.size))
        else:
            deviation = Number(np.sqrt(np.clip(v.value, 2.0**-100, 2.0**100)))
    gradient = given.get("gradient", zero)
    x0 = x0 + row["g0"] * gradient
    prev = row["c0"] * x0 + row["c1"] * x + row["c2"] * m + row["c3"] * given.get("history", zero)
    prev = prev + deviation * deviation * row["g1"] * gradient
    scale = np.zeros_like(x.value)
    if z is not None:
        prev = prev + row["s"] * deviation * Number(z)
        scale = scale + np.abs(row["s"].value * deviation.value)
    if "mask" in given:
        known = row["k0"] * given["known"]
        if z is not None:
            known = known + row["k1"] * Number(z)
        prev = given["mask"] * known + (prev - given["mask"] * prev)
        scale = scale * (1 + given["mask"].size)
        if z is not None:
            scale = scale + np.abs(row["k1"].value) * given["mask"].size
    return prev, x0, scale


@for_many(200)
def test_any_subset_of_options(device, choose: Choose):
    table = moved(make_table(7, seed=choose.integer(0, 99, "table")), device)
    inputs = Inputs(choose, len(table), device)
    x_t, t = inputs.tensor(inputs.x_dtype), inputs.t()
    asked = choose.one_of([True, True, False], "model output")
    model_output = inputs.tensor(inputs.y_dtype) if asked else None
    given = {name: inputs.tensor(inputs.x_dtype) for name in LIKE_X[:3] if choose.one_of([False, True], name)}
    if choose.one_of([False, True], "mask"):
        given |= {"known": inputs.tensor(inputs.x_dtype), "mask": inputs.tensor(inputs.x_dtype).sigmoid()}
    if asked and choose.one_of([False, True], "uncond_output"):
        given["uncond_output"] = inputs.tensor(inputs.y_dtype)
    variance = choose.one_of([None, "log", "direct"], "model_variance")
    if variance is not None:
        given["model_variance"] = inputs.tensor(inputs.y_dtype)
    for name in PER_SAMPLE:
        if choose.one_of([False, True], name):
            scales = torch.randn(2 * inputs.batch, generator=inputs.generator).to(device)
            given[name] = scales[::2] if choose.one_of([False, True], "apart") else scales[inputs.batch :]
    clip = choose.one_of(CLIPS, "clip")
    draws = table.view(torch.int32)[:, 6].long().cpu().numpy()[each(t, inputs.batch)] % 2**32
    z, noise, drawn = inputs.noise(draws, stream=0)

    x = host(x_t)
    row = dict(zip(COLUMNS, columns(table, t, x), strict=False))
    exact = {name: host(value) for name, value in given.items()}
    for name in set(PER_SAMPLE) & set(exact):
        exact[name] = exact[name].reshape(-1, *[1] * (x.ndim - 1))
    m = None if model_output is None else host(model_output)
    prev, x0, scale = formula(x, m, z, row, exact, variance == "log", clip)
    everything = {"x_t": x_t, "model_output": model_output, **given}
    before = {name: value.clone() for name, value in everything.items() if value is not None}
    for backend in (ops, reference):
        results = {name: torch.full_like(x_t, NAN) for name in RESULTS if choose.one_of([False, True], name)}
        got = backend.extended_step(
            x_t, model_output, table, t, clip=clip, log_variance=variance == "log", **noise, **given, **results
        )
        assert got.shape == x_t.shape and got.dtype == x_t.dtype and got.device == device
        assert roundings(got, prev, scale * NOISE_ERROR * drawn) <= ROUNDINGS
        if "x0_out" in results:
            assert roundings(results["x0_out"], x0) <= ROUNDINGS
        assert got is results.get("out", got) and torch.equal(results.get("out_copy", got), got)
    assert all(torch.equal(value, everything[name]) for name, value in before.items())


# --------------------------------------------------------------------------------------------- the plain step's bits


SHAPE = (8, 3, 5, 7)
NOISES = {"drawn": {"rng": Philox(3, 2**32 - 2)}, "given": {}, "none": {"add_noise": False}}
noises = pytest.mark.parametrize("noise", NOISES)


@pytest.fixture
def special(normal):
    """Random numbers with some infinities, NaN and zeros of both signs among them."""

    def make(seed, dtype=F32):
        x = normal(*SHAPE, seed=seed, dtype=dtype)
        x.view(-1)[seed % 3 :: 7] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-40]).repeat(20).to(x)
        return x

    return make


@pytest.fixture
def step(device, normal):
    """A float32 step of SHAPE by row t of the table, or by one row a sample. `changes` replace arguments."""

    def call(table, t=None, backend=ops, dtype=F32, model_dtype=None, **changes):
        model_dtype = model_dtype or dtype
        t = torch.arange(8, device=device) % len(table) if t is None else t
        x_t = changes.pop("x_t") if "x_t" in changes else normal(*SHAPE, dtype=dtype)
        model_output = changes.pop("model_output", normal(*SHAPE, seed=1, dtype=model_dtype))
        if not {"noise", "rng", "add_noise"} & set(changes):
            changes["rng"] = Philox(3)
        return backend.extended_step(x_t, model_output, table.to(device), t, **changes)

    return call


@noises
@PAIRS
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_without_extras_the_plain_steps_bits(step, special, device, noise, dtype, model_dtype, clip, memory):
    """The columns that only other options use may hold any number."""
    table, t = make_table(8), torch.arange(8, device=device)
    plain = table[:, :8].contiguous().to(device)
    how = {"clip": clip, **NOISES[noise]}
    if noise == "given":
        how["noise"] = special(2, dtype)
    x_t, model_output = special(0, dtype), special(1, model_dtype)
    expected = ops.reverse_step(x_t, model_output, plain, t, **how)
    if memory == "channels_last":
        x_t = x_t.to(memory_format=torch.channels_last)
    assert same_bits(step(table, t, x_t=x_t, model_output=model_output, **how), expected)
    assert same_bits(step(table, t, x_t=x_t, model_output=model_output, **how, out=x_t), expected)


@pytest.mark.parametrize("own", [{}, {"draw": 7, "stream": 200}])
@PAIRS
def test_noise_is_the_contracts(step, normal, device, dtype, model_dtype, own):
    """In an ordinary step, and for the noise of the known pixels."""
    zeros, ids = torch.zeros(SHAPE, dtype=dtype, device=device), torch.arange(8, device=device) * 2**40
    rng = Philox(2**63 + 5, ids, **own)
    z = randn(SHAPE, rng, draw=own.get("draw", 0), stream=own.get("stream", 0), device=device, dtype=dtype)
    nothing = {"x_t": zeros, "model_output": None, "clip": None, "rng": rng, "dtype": dtype}
    assert torch.equal(step(make_row(s=1.0), 0, **nothing), z)
    known = {"known": zeros, "mask": zeros + 1}
    assert torch.equal(step(make_row(k1=1.0), 0, **nothing, **known), z)
    assert torch.equal(step(make_row(k1=1.0, s=0.5), 0, **nothing, known=zeros, mask=zeros), z / 2)


# ------------------------------------------------------------------------------------------- factors that do nothing


@BACKENDS
@PAIRS
def test_guidance_of_1_does_not_read_the_unconditional_output(step, device, backend, dtype, model_dtype):
    nans = torch.full(SHAPE, NAN, dtype=model_dtype, device=device)
    table, kinds = make_table(8, w=1.0), {"backend": backend, "dtype": dtype, "model_dtype": model_dtype}
    assert same_bits(step(table, uncond_output=nans, **kinds), step(table, **kinds))
    table = make_table(8, w=1.5)
    assert step(table, uncond_output=nans, **kinds).isnan().all()


@BACKENDS
@PAIRS
def test_a_c3_of_0_does_not_read_the_history(step, device, backend, dtype, model_dtype):
    nans = torch.full(SHAPE, NAN, dtype=dtype, device=device)
    table, kinds = make_table(8, c3=0.0), {"backend": backend, "dtype": dtype, "model_dtype": model_dtype}
    assert same_bits(step(table, history=nans, **kinds), step(table, **kinds))
    assert step(make_table(8, c3=0.1), history=nans, **kinds).isnan().all()


@BACKENDS
def test_no_noise_no_variance(step, device, backend):
    nans = torch.full(SHAPE, NAN, device=device)
    table = make_table(8, s=0.0)
    assert same_bits(step(table, model_variance=nans, backend=backend), step(table, backend=backend))


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16])
@noises
def test_masks_of_0_and_1(step, normal, device, noise, dtype):
    table, shape = make_table(8), SHAPE
    z, known = normal(*shape, seed=2, dtype=dtype), normal(*shape, seed=3, dtype=dtype)
    how = {"noise": z} if noise == "given" else NOISES[noise]
    kinds = {"dtype": dtype, **how}
    mask = (normal(*shape, seed=4) > 0).to(dtype)
    free = step(table, **kinds)
    pairs, t = table[:, 12:14].contiguous().to(device), torch.arange(8, device=device)
    if noise == "drawn":  # in float32, but not where the forward process has other bits
        draws = table.view(torch.int32)[:, 6].long() % 2**32
        given = [randn(shape, how["rng"], draw=int(draw), device=device)[i] for i, draw in enumerate(draws)]
        noised = ops.forward_process(known.float(), pairs, t, noise=torch.stack(given)).to(dtype)
    else:
        noised = ops.forward_process(known, pairs, t, **how)
    got = step(table, **kinds, known=known, mask=mask)
    assert torch.equal(got, torch.where(mask == 1, noised, free))
    assert torch.equal(step(table, **kinds, known=known, mask=torch.zeros_like(mask)), free)


def test_scales_of_1_change_no_bit(step, device):
    ones = torch.ones(8, device=device)
    assert same_bits(step(make_table(8), output_scale=ones, x_start_scale=ones), step(make_table(8)))


# --------------------------------------------------------------------------------------------------- a model's variance


def deviations(step_of_row, v, device, **how):
    """The standard deviations that a step uses for the variances v: (count,) -> (count,)."""
    v = v.view(1, -1).to(device)
    zeros, ones = torch.zeros_like(v), torch.ones_like(v)
    return ops.extended_step(zeros, None, step_of_row.to(device), 0, model_variance=v, noise=ones, **how)[0]


def test_exponential(device):
    """The relative error is below 1.3 x 2^-24 for every float32 number in the range. Others count as its ends."""
    largest = torch.tensor(88.0).view(torch.int32).item()
    up = torch.arange(0, largest + 1, 511, dtype=torch.int32).view(F32)
    near = torch.arange(-126, 127).double()[:, None] * math.log(2) / 2 + torch.linspace(-1e-5, 1e-5, 401).double()
    v = torch.cat([up, -up[up <= 87], near.flatten().float(), torch.tensor([88.0, -87.0])])
    got = deviations(make_row(s=1.0, l1=1.0), v, device).double().cpu()
    truth = v.double().exp()
    assert ((got - truth).abs() / truth).max() <= 1.3 * 2.0**-24
    assert len(v) > 4_000_000

    beyond = torch.tensor([INF, 1e30, 88.1, -87.1, -1e30, -INF])
    ends = torch.tensor([88.0] * 3 + [-87.0] * 3)
    row = make_row(s=1.0, l1=1.0)
    assert torch.equal(deviations(row, beyond, device), deviations(row, ends, device))
    assert deviations(row, torch.tensor([NAN]), device).isnan().all()


def test_square_root(device):
    """Correctly rounded for every mantissa and every exponent. Numbers beyond [2^-100, 2^100] count as its ends."""
    mantissas = torch.arange(2**23, dtype=torch.int32).view(-1)
    v = torch.cat(
        [(mantissas[::step] + (exponent << 23)).view(F32) for exponent, step in [(127, 1), (128, 1)]]
        + [(mantissas[e % 997 :: 997] + ((127 + e) << 23)).view(F32) for e in range(-100, 100)]
    )
    row = make_row(s=1.0)
    got = deviations(row, v, device, log_variance=False).cpu()
    assert torch.equal(got.double(), v.double().sqrt().float().double())
    beyond = torch.tensor([0.0, -0.0, -1.0, 1e-40, 2.0**-101, 2.0**101, INF, -INF])
    ends = torch.tensor([2.0**-50] * 5 + [2.0**50] * 2 + [2.0**-50])
    assert torch.equal(deviations(row, beyond, device, log_variance=False).cpu(), ends)
    assert deviations(row, torch.tensor([NAN]), device, log_variance=False).isnan().all()


@BACKENDS
@pytest.mark.parametrize("log_variance", [True, False])
def test_a_gradient_is_scaled_by_the_variance(step, normal, device, backend, log_variance):
    """Neither by its square root, nor by s."""
    v, gradient = normal(*SHAPE, seed=5).sigmoid(), normal(*SHAPE, seed=6)
    row = make_row(g1=2.0, l0=0.25, l1=0.5, s=3.0)
    got = step(
        row, 0, backend, clip=None, add_noise=False, model_variance=v, gradient=gradient, log_variance=log_variance
    )
    variance = (0.5 + v.double()).exp() if log_variance else v.double()
    torch.testing.assert_close(got.double(), 2 * variance * gradient.double(), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------ empty


@BACKENDS
@PAIRS
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 0), (2, 3, 0, 5)])
def test_empty(device, backend, shape, dtype, model_dtype):
    x, m = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=model_dtype, device=device)
    given = moved(options(shape, dtype, model_dtype), device)
    for t in (0, torch.zeros(shape[0], dtype=torch.int64, device=device)):
        got = backend.extended_step(x, m, make_table(2).to(device), t, rng=Philox(0), **given, x0_out=x.clone())
        assert got.shape == shape and got.dtype == dtype
