"""step_with_options and its twin in `reference` against float64, and what each input must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.choices import Choose, for_many
from support.devices import moved
from support.operators import CLIPS, DTYPES, NOISE_ERROR, Inputs, as_float64, each, host, row_numbers
from support.rounding import Number, roundings, same_bits
from support.step_inputs import LIKE_X, PER_SAMPLE, RESULTS, make_row, make_table

from ddpm_ext import Philox, ops, randn, reference
from ddpm_ext.ops.row import ROW

F32 = torch.float32
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
PAIRS = pytest.mark.parametrize(("dtype", "model_dtype"), DTYPES)
# The error is counted in roundings of the sum of the terms' absolute values, as in test_ops.py. Measured worst of
# 3,000 examples: fused 2.20, reference 2.29; the margin is 2.2.
ROUNDINGS = 5
INF, NAN = math.inf, math.nan
SHAPE = (8, 3, 5, 7)
NOISES = {"drawn": {"rng": Philox(3, 2**32 - 2)}, "given": {}, "none": {"add_noise": False}}
noises = pytest.mark.parametrize("noise", NOISES)


# ------------------------------------------------------------------------------------------------- against float64


def formula(x, m, z, row, given, log_variance, clip):
    """prev, x0 and what is kept, by the equation of ops.step_with_options, and the factor of each normal.

    `row` has numbers by name.
    """
    row = {name: Number(value) for name, value in row.items()}
    given = {name: Number(value) for name, value in given.items()}
    x, zero, one = Number(x), Number(np.zeros_like(x)), Number(np.ones_like(x))
    u, m = given.get("uncond_output", zero), zero if m is None else Number(m)
    if "uncond_output" in given:
        m = u + row["w"] * (m - u)
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
    prev = row["c0"] * x0 + row["c1"] * x + row["c2"] * m + row["cu"] * u
    for number in "123":
        prev = prev + row["h" + number] * given.get("history" + number, zero)
    prev = prev + deviation * deviation * row["g1"] * gradient
    z, scale = zero if z is None else Number(z), np.abs(row["s"].value * deviation.value)
    prev = prev + row["s"] * deviation * z
    if "mask" in given:
        known = row["signal_after"] * given["known"] + row["noise_after"] * z
        prev = given["mask"] * known + (prev - given["mask"] * prev)
        scale = scale * (1 + given["mask"].size) + np.abs(row["noise_after"].value) * given["mask"].size
    return prev, x0, row["k0"] * x0 + row["k1"] * x + row["k2"] * m, scale


@for_many(250)
def test_any_subset_of_inputs(device, choose: Choose):
    table = moved(make_table(7, seed=choose.integer(0, 99, "table")), device)
    inputs = Inputs(choose, len(table), device)
    x_t, t = inputs.tensor(inputs.x_dtype), inputs.t()
    asked = choose.one_of([True, True, False], "model output")
    model_output = inputs.tensor(inputs.y_dtype) if asked else None
    pair = ("known", "mask")
    like_x = [name for name in LIKE_X if name not in pair and choose.one_of([False, True], name)]
    given = {name: inputs.tensor(inputs.x_dtype) for name in like_x}
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
    draws = table.view(torch.int32)[:, ROW.index("draw")].long().cpu().numpy()[each(t, inputs.batch)] % 2**32
    z, noise, drawn = inputs.noise(draws, stream=0)

    x = host(x_t)
    exact = {name: host(value) for name, value in given.items()}
    for name in set(PER_SAMPLE) & set(exact):
        exact[name] = exact[name].reshape(-1, *[1] * (x.ndim - 1))
    m = None if model_output is None else host(model_output)
    row = row_numbers(table, t, x)
    prev, x0, kept, scale = formula(x, m, z, row, exact, variance == "log", clip)
    c_in = Number(row["c_in"])
    wide = {name: value.double() for name, value in (given | noise).items() if isinstance(value, torch.Tensor)}
    if not drawn:  # in float64 the reference has the formula's numbers, but for their rounding
        results = {name: torch.empty_like(x_t, dtype=torch.float64) for name in RESULTS}
        output = None if model_output is None else model_output.double()
        how = {"clip": clip, "log_variance": variance == "log", "add_noise": False}
        reference.step_with_options(x_t.double(), output, as_float64(table), t, **how, **wide, **results)
        for name, truth in (("out", prev), ("x0_out", x0), ("history_out", kept)):
            assert (np.abs(host(results[name]) - truth.value) <= 1e-14 * truth.size).all()
    everything = {"x_t": x_t, "model_output": model_output, **given}
    before = {name: value.clone() for name, value in everything.items() if value is not None}
    for backend in (ops, reference):
        results = {name: torch.full_like(x_t, NAN) for name in RESULTS if choose.one_of([False, True], name)}
        if "model_input" in results:  # of any dtype, once or twice
            whole = torch.cat([results["model_input"]] * choose.one_of([1, 2], "halves"))
            whole = whole.to(choose.one_of([F32, torch.float16, torch.bfloat16], "input dtype"))
            apart = choose.one_of([False, True], "apart")
            results["model_input"] = torch.stack([whole, whole], -1)[..., 0] if apart else whole
        got = backend.step_with_options(
            x_t, model_output, table, t, clip=clip, log_variance=variance == "log", **noise, **given, **results
        )
        assert got.shape == x_t.shape and got.dtype == x_t.dtype and got.device == device
        assert roundings(got, prev, scale * NOISE_ERROR * drawn) <= ROUNDINGS
        for name, truth in (("x0_out", x0), ("history_out", kept)):
            assert name not in results or roundings(results[name], truth) <= ROUNDINGS
        assert got is results.get("out", got)
        for half in results["model_input"].split(len(x_t)) if "model_input" in results and len(x_t) else ():
            assert roundings(half, c_in * prev, np.abs(c_in.value) * scale * NOISE_ERROR * drawn) <= ROUNDINGS
    assert all(torch.equal(value, everything[name]) for name, value in before.items())


# --------------------------------------------------------------------------------------------- the plain step's bits


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
    """A step of SHAPE, by one row a sample of the table. `changes` replace arguments."""

    def call(table, t=None, backend=ops, dtype=F32, model_dtype=None, **changes):
        t = torch.arange(8, device=device) % len(table) if t is None else t
        x_t = changes.pop("x_t") if "x_t" in changes else normal(*SHAPE, dtype=dtype)
        model_output = changes.pop("model_output", normal(*SHAPE, seed=1, dtype=model_dtype or dtype))
        if not {"noise", "rng", "add_noise"} & set(changes):
            changes["rng"] = Philox(3)
        return backend.step_with_options(x_t, model_output, table.to(device), t, **changes)

    return call


@noises
@PAIRS
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_without_inputs_the_plain_steps_bits(step, special, device, noise, dtype, model_dtype, clip):
    """Also by the kernel with options, which a second result asks for. Numbers of other tensors may hold anything."""
    table, how = make_table(8, c_in=1.0), {"clip": clip, **NOISES[noise]}
    if noise == "given":
        how["noise"] = special(2, dtype)
    x_t, m = special(0, dtype), special(1, model_dtype)
    expected = ops.reverse_step(x_t, m, table.to(device), torch.arange(8, device=device), **how)
    copy = torch.empty_like(x_t)
    assert same_bits(step(table, x_t=x_t, model_output=m, **how, model_input=copy), expected)
    assert same_bits(copy, expected)
    last = x_t.to(memory_format=torch.channels_last)
    assert same_bits(step(table, x_t=last, model_output=m, **how, out=last), expected)


# ------------------------------------------------------------------------------------------- factors that do nothing


@BACKENDS
@pytest.mark.parametrize("column", ["cu", "h1", "h2", "h3"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_factor_of_0_leaves_its_tensor_out(step, device, backend, column, value):
    name = "uncond_output" if column == "cu" else f"history{column[1]}"
    for i, factor in enumerate((0.0, -0.0, 0.1)):
        dtype, model_dtype = DTYPES[(i + ord(column[1])) % len(DTYPES)]
        kinds = {"backend": backend, "dtype": dtype, "model_dtype": model_dtype}
        tensor = torch.full(SHAPE, value, dtype=model_dtype if column == "cu" else dtype, device=device)
        table = make_table(8, w=1.0, **{column: factor})
        got = step(table, **{name: tensor}, **kinds)
        assert same_bits(got, step(table, **kinds)) == (factor == 0)
        assert not got.isfinite().any() or factor == 0


@BACKENDS
@PAIRS
def test_guidance_of_1_leaves_the_unconditional_output_out(step, device, backend, dtype, model_dtype):
    nans = torch.full(SHAPE, NAN, dtype=model_dtype, device=device)
    kinds = {"backend": backend, "dtype": dtype, "model_dtype": model_dtype}
    table = make_table(8, w=1.0, cu=0.0)
    assert same_bits(step(table, uncond_output=nans, **kinds), step(table, **kinds))
    assert step(make_table(8, w=1.5, cu=0.0), uncond_output=nans, **kinds).isnan().all()


@BACKENDS
def test_no_noise_no_variance(step, device, backend):
    nans, table = torch.full(SHAPE, NAN, device=device), make_table(8, s=0.0)
    assert same_bits(step(table, model_variance=nans, backend=backend), step(table, backend=backend))


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16])
@noises
def test_masks_of_0_and_1(step, normal, device, noise, dtype):
    table = make_table(8)
    z, known = normal(*SHAPE, seed=2, dtype=dtype), normal(*SHAPE, seed=3, dtype=dtype)
    how = {"noise": z} if noise == "given" else NOISES[noise]
    mask = (normal(*SHAPE, seed=4) > 0).to(dtype)
    free = step(table, dtype=dtype, **how)
    pairs = table[:, [ROW.index(name) for name in ("signal_after", "noise_after")]].to(device)
    t = torch.arange(8, device=device)
    if noise == "drawn":  # in float32, but not where the forward process has other bits
        draws = table.view(torch.int32)[:, ROW.index("draw")].long() % 2**32
        given = [randn(SHAPE, how["rng"], draw=int(draw), device=device)[i] for i, draw in enumerate(draws)]
        noised = ops.forward_process(known.float(), pairs, t, noise=torch.stack(given)).to(dtype)
    else:
        noised = ops.forward_process(known, pairs, t, **how)
    got = step(table, dtype=dtype, **how, known=known, mask=mask)
    assert torch.equal(got, torch.where(mask == 1, noised, free))
    assert torch.equal(step(table, dtype=dtype, **how, known=known, mask=torch.zeros_like(mask)), free)


@BACKENDS
def test_what_is_kept_is_exactly_what_the_row_names(step, special, backend):
    """A factor of 1 copies its tensor, with infinities and the signs of zeros, whatever the others hold."""
    x, m = special(0), special(1)
    results = {name: torch.empty_like(x) for name in ("x0_out", "history_out")}
    for column, truth in (("k0", results["x0_out"]), ("k1", x), ("k2", m)):
        row = make_row(a=0.5, b=2.0, c0=1.0, **{column: 1.0})
        step(row, 0, backend, x_t=x, model_output=m, add_noise=False, **results)
        if backend is ops:
            assert same_bits(results["history_out"], truth)
        else:
            assert torch.equal(results["history_out"].nan_to_num(7), truth.nan_to_num(7))


@BACKENDS
def test_an_infinite_output_that_the_clip_makes_finite(step, device, backend):
    """Rows without c2 and k2 use the model's output in x0 alone."""
    x, m = torch.zeros(SHAPE, device=device), torch.full(SHAPE, INF, device=device)
    row, kept = make_row(b=1.0, c0=0.5, k0=2.0), torch.empty_like(x)
    got = step(row, 0, backend, x_t=x, model_output=m, add_noise=False, history_out=kept)
    assert (got == 0.5).all() and (kept == 2).all()


# --------------------------------------------------------------------------------------------------- a model's variance


def deviations(v, device, backend=ops, **how):
    """The standard deviations that a step uses for the variances v: (count,) -> (count,)."""
    v = v.view(1, -1).to(device)
    zeros, ones, row = torch.zeros_like(v), torch.ones_like(v), make_row(s=1.0, l1=1.0).to(device)
    return backend.step_with_options(zeros, None, row, 0, model_variance=v, noise=ones, **how)[0].cpu()


def test_exponential(device):
    """The relative error is below 1.3 x 2^-24 for every float32 number in the range. Others count as its ends."""
    largest = torch.tensor(88.0).view(torch.int32).item()
    up = torch.arange(0, largest + 1, 511, dtype=torch.int32).view(F32)
    near = torch.arange(-126, 127).double()[:, None] * math.log(2) / 2 + torch.linspace(-1e-5, 1e-5, 401).double()
    v = torch.cat([up, -up[up <= 87], near.flatten().float(), torch.tensor([88.0, -87.0])])
    truth = v.double().exp()
    assert ((deviations(v, device).double() - truth).abs() / truth).max() <= 1.3 * 2.0**-24
    assert len(v) > 4_000_000
    beyond = torch.tensor([INF, 1e30, 88.1, -87.1, -1e30, -INF])
    ends = torch.tensor([88.0] * 3 + [-87.0] * 3)
    for backend in (ops, reference):
        got = deviations(beyond, device, backend)
        assert torch.equal(got, deviations(ends, device, backend))
        torch.testing.assert_close(got.double(), ends.double().exp(), rtol=1e-6, atol=0)
        assert deviations(torch.tensor([NAN]), device, backend).isnan().all()


def test_square_root(device):
    """Correctly rounded for every mantissa and every exponent. Numbers beyond [2^-100, 2^100] count as its ends."""
    mantissas = torch.arange(2**23, dtype=torch.int32).view(-1)
    v = torch.cat(
        [(mantissas + (exponent << 23)).view(F32) for exponent in (127, 128)]
        + [(mantissas[e % 997 :: 997] + ((127 + e) << 23)).view(F32) for e in range(-100, 100)]
    )
    assert torch.equal(deviations(v, device, log_variance=False).double(), v.double().sqrt().float().double())
    beyond = torch.tensor([0.0, -0.0, -1.0, 1e-40, 2.0**-101, 2.0**101, INF, -INF])
    ends = torch.tensor([2.0**-50] * 5 + [2.0**50] * 2 + [2.0**-50])
    for backend in (ops, reference):
        assert torch.equal(deviations(beyond, device, backend, log_variance=False), ends)
        assert deviations(torch.tensor([NAN]), device, backend, log_variance=False).isnan().all()
