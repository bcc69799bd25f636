"""The linear step and its twin in `reference` against float64, and the bits that it shares with the other steps."""

from __future__ import annotations

import math

import pytest
import torch
from support import extended
from support.choices import Choose, for_many
from support.devices import moved
from support.linear import COLUMNS, LIKE_X, PER_SAMPLE, RESULTS, make_row, make_table, options
from support.operators import CLIPS, DTYPES, NOISE_ERROR, Inputs, columns, each, host
from support.rounding import Number, roundings, same_bits

from ddpm_ext import Philox, ops, randn, reference

F32 = torch.float32
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["fused", "reference"])
PAIRS = pytest.mark.parametrize(("dtype", "model_dtype"), DTYPES)
# The error is counted in roundings of the sum of the terms' absolute values, as in test_ops.py. Measured worst of
# 3,000 examples: fused 1.79, reference 2.36.
ROUNDINGS = 5
INF, NAN = math.inf, math.nan
SHAPE = (8, 3, 5, 7)
NOISES = {"drawn": {"rng": Philox(3, 2**32 - 2)}, "given": {}, "none": {"add_noise": False}}
noises = pytest.mark.parametrize("noise", NOISES)


# ------------------------------------------------------------------------------------------------- against float64


def formula(x, m, z, row, given, clip) -> tuple[Number, Number, Number]:
    """prev, x0 and what is kept, by the equation of ops.linear_step. `row` has numbers by column."""
    row = {name: Number(row[name]) for name in COLUMNS}
    given = {name: Number(value) for name, value in given.items()}
    x, zero, one = Number(x), Number(0.0 * x), Number(0.0 * x + 1)
    m = zero if m is None else Number(m)
    u = given.get("uncond_output", zero)
    if "uncond_output" in given:
        m = u + row["w"] * (m - u)
    m = m * given.get("output_scale", one)
    x0 = (given["x_start"] if "x_start" in given else row["a"] * x + row["b"] * m) * given.get("x_start_scale", one)
    if clip is not None:
        x0 = x0.clip(*clip)
    prev = row["c0"] * x0 + row["c1"] * x + row["c2"] * m + row["cu"] * u
    for number in "123":
        prev = prev + row["h" + number] * given.get("history" + number, zero)
    if z is not None:
        prev = prev + row["s"] * Number(z)
    return prev, x0, row["k0"] * x0 + row["k1"] * x + row["k2"] * m


@for_many(200)
def test_any_subset_of_options(device, choose: Choose):
    table = moved(make_table(7, seed=choose.integer(0, 99, "table")), device)
    inputs = Inputs(choose, len(table), device)
    x_t, t = inputs.tensor(inputs.x_dtype), inputs.t()
    asked = choose.one_of([True, True, False], "model output")
    model_output = inputs.tensor(inputs.y_dtype) if asked else None
    given = {name: inputs.tensor(inputs.x_dtype) for name in LIKE_X if choose.one_of([False, True], name)}
    if asked and choose.one_of([False, True], "uncond_output"):
        given["uncond_output"] = inputs.tensor(inputs.y_dtype)
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
    prev, x0, kept = formula(x, m, z, row, exact, clip)
    noise_error = abs(row["s"]) * NOISE_ERROR * drawn
    everything = {"x_t": x_t, "model_output": model_output, **given}
    before = {name: value.clone() for name, value in everything.items() if value is not None}
    for backend in (ops, reference):
        results = {name: torch.full_like(x_t, NAN) for name in RESULTS if choose.one_of([False, True], name)}
        got = backend.linear_step(x_t, model_output, table, t, clip=clip, **noise, **given, **results)
        assert got.shape == x_t.shape and got.dtype == x_t.dtype and got.device == device
        assert roundings(got, prev, noise_error) <= ROUNDINGS
        assert got is results.get("out", got) and torch.equal(results.get("out_copy", got), got)
        for name, truth in (("x0_out", x0), ("history_out", kept)):
            assert name not in results or roundings(results[name], truth) <= ROUNDINGS
    assert all(torch.equal(value, everything[name]) for name, value in before.items())


# ----------------------------------------------------------------------------------------- the bits of the other steps


@pytest.fixture
def special(normal):
    """Random numbers with some infinities, NaN and zeros of both signs among them."""

    def make(seed, dtype=F32):
        x = normal(*SHAPE, seed=seed, dtype=dtype)
        x.view(-1)[seed % 3 :: 7] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-40]).repeat(20).to(x)
        return x

    return make


@noises
@PAIRS
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_without_options_the_plain_steps_bits(special, device, noise, dtype, model_dtype, clip, memory):
    """The columns of tensors that the call does not have may hold any number."""
    table, t = make_table(8).to(device), torch.arange(8, device=device)
    how = {"clip": clip, **NOISES[noise]}
    if noise == "given":
        how["noise"] = special(2, dtype)
    x_t, model_output = special(0, dtype), special(1, model_dtype)
    expected = ops.reverse_step(x_t, model_output, table[:, :8].contiguous(), t, **how)
    if memory == "channels_last":
        x_t = x_t.to(memory_format=torch.channels_last)
    assert same_bits(ops.linear_step(x_t, model_output, table, t, **how), expected)
    assert same_bits(ops.linear_step(x_t, model_output, table, t, **how, out=x_t), expected)


@noises
@PAIRS
@pytest.mark.parametrize("history", [False, True])
def test_the_extended_steps_bits(special, device, noise, dtype, model_dtype, history):
    """Without a history, or with one tensor of it, the options that both steps have give the same bits."""
    rows, t = extended.make_table(8), torch.arange(8, device=device)
    table = make_table(8, cu=0.0, h1=0.0, h2=0.0, h3=0.0)
    table[:, :7], table[:, 14] = rows[:, :7], rows[:, 14]
    table.view(torch.int32)[:, 6] = rows.view(torch.int32)[:, 6]
    if history:
        table[:, COLUMNS.index("h1")] = rows[:, 7]
    given = {"x_t": special(0, dtype), "model_output": special(1, model_dtype), **NOISES[noise]}
    given |= {"uncond_output": special(3, model_dtype), "x0_out": torch.empty(SHAPE, dtype=dtype, device=device)}
    given |= moved({name: options(SHAPE, dtype, model_dtype)[name] for name in PER_SAMPLE}, device)
    if noise == "given":
        given["noise"] = special(2, dtype)
    memory = [special(seed, dtype) for seed in (4, 5, 6)]
    for more in ({}, {"x_start": special(7, dtype)}):
        expected = ops.extended_step(
            **given, **more, table=rows.to(device), t=t, history=memory[0] if history else None
        ).clone()
        x0 = given["x0_out"].clone()
        histories = {f"history{number}": h for number, h in enumerate(memory, start=1)}
        assert same_bits(ops.linear_step(**given, **more, table=table.to(device), t=t, **histories), expected)
        assert same_bits(given["x0_out"], x0)


@PAIRS
@pytest.mark.parametrize("own", [{}, {"draw": 7, "stream": 200}])
def test_noise_is_the_contracts(device, dtype, model_dtype, own):
    zeros, ids = torch.zeros(SHAPE, dtype=dtype, device=device), torch.arange(8, device=device) * 2**40
    rng = Philox(2**63 + 5, ids, **own)
    z = randn(SHAPE, rng, draw=own.get("draw", 0), stream=own.get("stream", 0), device=device, dtype=dtype)
    assert torch.equal(ops.linear_step(zeros, None, make_row(s=1.0).to(device), 0, clip=None, rng=rng), z)


# ------------------------------------------------------------------------------------------- factors that do nothing


FACTORS = {
    **{"cu": "uncond_output", "h1": "history1", "h2": "history2", "h3": "history3"},
    **{"c2": "model_output", "s": "rng"},
}


@BACKENDS
@PAIRS
@pytest.mark.parametrize("column", ["cu", "h1", "h2", "h3"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_factor_of_0_leaves_its_tensor_out(normal, device, backend, dtype, model_dtype, column, value):
    name = FACTORS[column]
    tensor = torch.full(SHAPE, value, dtype=model_dtype if name == "uncond_output" else dtype, device=device)
    x, m, t = normal(*SHAPE, dtype=dtype), normal(*SHAPE, seed=1, dtype=model_dtype), torch.arange(8, device=device)
    for factor in (0.0, -0.0, 0.1):
        table = make_table(8, w=1.0, **{column: factor}).to(device)
        without = backend.linear_step(x, m, table, t, rng=Philox(3))
        got = backend.linear_step(x, m, table, t, rng=Philox(3), **{name: tensor})
        assert same_bits(got, without) == (factor == 0)
        assert not got.isfinite().any() or factor == 0


@BACKENDS
@PAIRS
def test_guidance_of_1_leaves_the_unconditional_output_out(normal, device, backend, dtype, model_dtype):
    nans = torch.full(SHAPE, NAN, dtype=model_dtype, device=device)
    x, m = normal(*SHAPE, dtype=dtype), normal(*SHAPE, seed=1, dtype=model_dtype)
    for w in (1.0, 1.5):
        table = make_table(2, w=w, cu=0.0).to(device)
        without = backend.linear_step(x, m, table, 1, rng=Philox(3))
        assert same_bits(backend.linear_step(x, m, table, 1, rng=Philox(3), uncond_output=nans), without) == (w == 1)


@BACKENDS
def test_what_is_kept_is_exactly_what_the_row_names(special, device, backend):
    """A factor of 1 copies its tensor, with infinities and the signs of zeros, whatever the others hold."""
    x, m = special(0), special(1)
    results = {name: torch.empty_like(x) for name in ("x0_out", "history_out")}
    for column, truth in (("k0", "x0_out"), ("k1", x), ("k2", m)):
        row = make_row(a=0.5, b=2.0, c0=1.0, **{column: 1.0}).to(device)
        backend.linear_step(x, m, row, 0, add_noise=False, **results)
        truth = results[truth] if isinstance(truth, str) else truth
        if backend is ops:
            assert same_bits(results["history_out"], truth)
        else:
            assert torch.equal(results["history_out"].nan_to_num(7), truth.nan_to_num(7))


@BACKENDS
def test_an_infinite_output_that_the_clip_makes_finite(device, backend):
    """Rows without c2 and k2 use the model's output in x0 alone."""
    x, m = torch.zeros(SHAPE, device=device), torch.full(SHAPE, INF, device=device)
    kept = torch.empty_like(x)
    got = backend.linear_step(x, m, make_row(b=1.0, c0=0.5, k0=2.0).to(device), 0, add_noise=False, history_out=kept)
    assert (got == 0.5).all() and (kept == 2).all()


def test_scales_of_1_change_no_bit(normal, device):
    x, m, t = normal(*SHAPE), normal(*SHAPE, seed=1), torch.arange(8, device=device)
    table, ones = make_table(8).to(device), torch.ones(8, device=device)
    scaled = ops.linear_step(x, m, table, t, rng=Philox(3), output_scale=ones, x_start_scale=ones)
    assert same_bits(scaled, ops.linear_step(x, m, table, t, rng=Philox(3)))


# -------------------------------------------------------------------------------------------------- layouts and threads


@noises
@PAIRS
def test_layouts_and_batches_have_the_same_bits(normal, device, noise, dtype, model_dtype):
    given = {"x_t": normal(*SHAPE, dtype=dtype), "model_output": normal(*SHAPE, seed=1, dtype=model_dtype)}
    given |= moved(options(SHAPE, dtype, model_dtype), device)
    if noise == "given":
        given["noise"] = normal(*SHAPE, seed=2, dtype=dtype)
    table, ids = make_table(8).to(device), torch.arange(8, device=device) + 2**32 - 2

    def run(tensors, samples):
        how = {"rng": Philox(3, ids[samples])} if noise == "drawn" else {"add_noise": False} if noise == "none" else {}
        results = {name: torch.empty_like(tensors["x_t"]) for name in RESULTS}
        ops.linear_step(**tensors, table=table, t=torch.arange(8, device=device)[samples], **how, **results)
        return results

    every = slice(0, 8)
    expected = run(given, every)
    last = {n: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for n, v in given.items()}
    apart = {n: torch.stack([v, v], -1)[..., 0] for n, v in given.items()}
    for tensors in (last, apart, given | {"x_t": last["x_t"], "history2": apart["history2"]}):
        assert all(same_bits(result, expected[name]) for name, result in run(tensors, every).items())
    for samples in (slice(0, 3), slice(3, 8)):
        part = run({n: v[samples] for n, v in given.items()}, samples)
        assert all(same_bits(result, expected[name][samples]) for name, result in part.items())


def test_threads_do_not_change_a_bit():
    shape = (3, 70_001)
    x, m = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    given, t = options(shape, F32, F32), torch.tensor([3, 1, 2])
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results = {name: torch.empty(shape) for name in RESULTS}
            ops.linear_step(x, m, make_table(8), t, rng=Philox(1), **given, **results)
            found.append(results)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in RESULTS)


@BACKENDS
@PAIRS
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 0), (2, 3, 0, 5)])
def test_empty(device, backend, shape, dtype, model_dtype):
    x, m = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=model_dtype, device=device)
    given = moved(options(shape, dtype, model_dtype), device)
    for t in (0, torch.zeros(shape[0], dtype=torch.int64, device=device)):
        got = backend.linear_step(x, m, make_table(2).to(device), t, rng=Philox(0), **given, history_out=x.clone())
        assert got.shape == shape and got.dtype == dtype


# ------------------------------------------------------------------------------------------------ a solver of the field


def test_a_multistep_solver_over_its_ring_of_histories(normal, device):
    """Adams-Bashforth of order 4 on the model's output, PNDM's linear multistep method (Liu et al. 2022, eq. 12),
    over a ring of three tensors that each step's history_out goes round."""
    weights = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    factors = [weights[min(i, 3)] for i in range(9)]
    rows = [
        make_row(c1=0.9, c2=0.2 * f[0], k2=1.0, **{f"h{i}": 0.2 * h for i, h in enumerate(f[1:], start=1)})
        for f in factors
    ]
    table, outputs = torch.cat(rows).to(device), [normal(*SHAPE, seed=seed) for seed in range(9)]
    x, truth = normal(*SHAPE, seed=99), normal(*SHAPE, seed=99).double()
    ring = [torch.full(SHAPE, NAN, device=device) for _ in range(3)]
    for i, (m, f) in enumerate(zip(outputs, factors, strict=True)):
        histories = {f"history{n}": ring[(i - n) % 3] for n in (1, 2, 3)}
        ops.linear_step(x, m, table, i, clip=None, add_noise=False, out=x, history_out=ring[i % 3], **histories)
        truth = 0.9 * truth + 0.2 * sum(w * outputs[i - n].double() for n, w in enumerate(f))
    torch.testing.assert_close(x.double(), truth, rtol=1e-5, atol=1e-6)
