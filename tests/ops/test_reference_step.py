"""The step in plain torch against its equation in float64, written with Python's own numbers, element by element."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from support.choices import for_many

from ddpm_ext import Philox, reference
from ddpm_ext.ops import reference as twins
from ddpm_ext.ops.row import ROW, row_numbers
from ddpm_ext.ops.step_inputs import STEP_INPUTS, InputKind, names
from ddpm_ext.tables.step_table import ADDED, FACTORS, StepTable

SHAPE = (3, 2, 5)
RESULTS = names(InputKind.RESULT)
READ = [name for name, kind in STEP_INPUTS.items() if kind not in (InputKind.RESULT, InputKind.FLAG)]


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_table(rows=4, zeros=()):
    """Random numbers, and zeros in the named columns."""
    columns = {name: random(i, rows) for i, name in enumerate((*FACTORS, *ADDED))}
    columns |= {name: columns[name].abs() for name in ("signal_now", "noise_now", "signal_after", "noise_after")}
    columns |= {name: torch.zeros(rows) for name in zeros}
    return StepTable(timestep=range(rows), **columns)


def make_inputs(chosen):
    inputs = {}
    for i, name in enumerate(chosen):
        shape = SHAPE[:1] if STEP_INPUTS[name] is InputKind.PER_SAMPLE else SHAPE
        inputs[name] = random(100 + i, *shape)
    for name in ("mask", "output_scale", "x_start_scale"):
        if name in inputs:
            inputs[name] = inputs[name].sigmoid()
    return inputs


def equation(row, w, x, m, z, clip, log_variance, given):
    """prev, x0 and what is kept, of one element."""
    u = given.get("uncond_output", 0.0)
    if "uncond_output" in given:
        m = u + w * (m - u)
    m *= given.get("output_scale", 1.0)
    x0 = given.get("x_start", row.a * x + row.b * m) * given.get("x_start_scale", 1.0)
    x0 = min(max(x0, clip[0]), clip[1]) if clip else x0
    g, v = given.get("gradient", 0.0), given.get("model_variance")
    x0 += row.g0 * g
    deviation = 1.0
    if v is not None:
        deviation = math.exp(row.l0 + row.l1 * v) if log_variance else math.sqrt(max(v, 2.0**-100))
    prev = row.c0 * x0 + row.c1 * x + row.c2 * m + row.cu * u + deviation**2 * row.g1 * g + row.s * deviation * z
    for k in "123":
        prev += getattr(row, f"h{k}") * given.get(f"history{k}", 0.0)
    if "mask" in given:
        known = row.signal_after * given["known"] + row.noise_after * z
        prev = given["mask"] * known + (1 - given["mask"]) * prev
    return prev, x0, row.k0 * x0 + row.k1 * x + row.k2 * m


@for_many(150)
def test_any_inputs(choose):
    chosen = [name for name in READ if choose.one_of([False, True], name)]
    if ("known" in chosen) != ("mask" in chosen):
        chosen = [name for name in chosen if name not in ("known", "mask")]
    results = {name: torch.empty(SHAPE, dtype=torch.float64) for name in RESULTS if choose.one_of([False, True], name)}
    clip, log_variance = choose.one_of([None, (-1.0, 1.0), (-0.2, 0.7)]), choose.one_of([False, True])
    rows = torch.tensor([choose.integer(0, 3) for _ in range(3)])
    t = rows if choose.one_of([False, True]) else int(rows[0])
    table, inputs, w = make_table(), make_inputs(chosen), random(7, 4)
    x, m, z = random(8, 3, *SHAPE)
    step = twins.TableStep(table.packed("cpu", torch.float64, w), clip=clip)
    row, index = (t, 0) if isinstance(t, torch.Tensor) else (None, t)
    given = {**inputs, "log_variance": log_variance, **results}
    prev = step.take(x, m, row, index, noise=z, **given)
    for i in range(SHAPE[0]):
        at = int(t[i]) if isinstance(t, torch.Tensor) else t
        for j in range(math.prod(SHAPE[1:])):
            element = {
                name: tensor[i].reshape(-1)[j if tensor.dim() > 1 else 0].item() for name, tensor in inputs.items()
            }
            numbers = (each[i].reshape(-1)[j].item() for each in (x, m, z))
            expected = equation(table[at], w[at].item(), *numbers, clip, log_variance, element)
            names_of = ((prev, 0), (results.get("out_copy"), 0), (results.get("x0_out"), 1))
            for found, k in (*names_of, (results.get("history_out"), 2)):
                if found is not None:
                    assert found[i].reshape(-1)[j].item() == pytest.approx(expected[k], rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("column", "name"),
    [("cu", "uncond_output"), ("h1", "history1"), ("h2", "history2"), ("h3", "history3"), ("c2", "model_output")],
)
def test_a_tensor_whose_factor_is_zero_may_be_infinite(column, name):
    """And where w is 1, the unconditional output is not read."""
    table = make_table(zeros=(column, "k2")).packed("cpu", torch.float64)
    x, m, z = random(1, 3, *SHAPE)
    inputs = {"model_output": m, "x_start": random(2, *SHAPE)}
    finite = inputs | {name: m}
    expected = reference.step_with_options(x, table=table, t=1, noise=z, **finite)
    inputs[name] = torch.full(SHAPE, math.inf, dtype=torch.float64)
    kept = torch.empty_like(x)
    assert torch.equal(reference.step_with_options(x, table=table, t=1, noise=z, history_out=kept, **inputs), expected)
    assert kept.isfinite().all()


def test_the_step_without_inputs_is_the_plain_step():
    table = make_table().packed("cpu", torch.float64)
    x, m, z = random(3, 3, *SHAPE)
    for how in ({"noise": z}, {"add_noise": False}, {"rng": Philox(3, 5)}):
        found = reference.step_with_options(x, m, table, torch.tensor([2, 0, 3]), **how)
        expected = reference.reverse_step(x, m, table, torch.tensor([2, 0, 3]), **how)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(twins.TableStep(table, **how).take(x, m, torch.tensor([2, 0, 3]), 0), expected)
    alone = twins.TableStep(table, add_noise=False)
    assert torch.equal(
        alone.take(x, None, None, 2, x_start=m),
        reference.step_with_options(x, None, table, 2, x_start=m, add_noise=False),
    )
    assert torch.equal(alone.take(x, m, None, 2, noise=z), reference.reverse_step(x, m, table, 2, noise=z))


def test_results_may_be_inputs():
    table = make_table().packed("cpu", torch.float64)
    x, m, h = random(4, 3, *SHAPE)
    kept = torch.empty_like(x)
    expected = reference.step_with_options(x, m, table, 0, add_noise=False, history3=h, history_out=kept)
    found = reference.step_with_options(x, m, table, 0, add_noise=False, history3=h, history_out=h, out=x)
    assert found is x and torch.equal(x, expected) and torch.equal(h, kept)


def test_numbers_are_taken_by_their_names():
    table = StepTable(range(2), *random(5, 5, 2), draw=[2**32 - 1, 7], k1=[3.0, 4.0])
    for dtype in (torch.float32, torch.float64):
        row = row_numbers(table.packed("cpu", dtype), torch.tensor([1, 0, 1]), torch.zeros(SHAPE), torch.float64)
        assert row._fields == ROW and row.draw.tolist() == [7, 2**32 - 1, 7]
        assert row.k1.shape == (3, 1, 1) and row.k1.dtype == torch.float64 and row.k1.flatten().tolist() == [4, 3, 4]
    with pytest.raises(ValueError, match=r"table has shape \(2, 8\), expected \(rows, 24\)"):
        row_numbers(torch.zeros(2, 8), 0, torch.zeros(SHAPE), torch.float32)


def test_the_signature_is_the_list():
    parameters = inspect.signature(reference.step_with_options).parameters
    assert [name for name in parameters if name in STEP_INPUTS] == list(STEP_INPUTS)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask": torch.ones(SHAPE)}, "mask is given without known, expected both"),
        ({"known": torch.ones(SHAPE)}, "known is given without mask, expected both"),
        ({"model_output": None, "uncond_output": torch.ones(SHAPE)}, "uncond_output is given without model_output"),
        ({"history2": torch.ones(3, 2, 4)}, r"history2 has shape \(3, 2, 4\), expected that of x_t"),
        ({"output_scale": torch.ones(2)}, r"output_scale has shape \(2,\), expected \(3,\), one a sample"),
        ({"noise": torch.ones(SHAPE), "rng": Philox(0)}, "noise and rng are both given"),
        ({"t": 4}, "t is 4, expected 0 <= t < 4"),
    ],
)
def test_refused(inputs, message):
    good = {"x_t": torch.ones(SHAPE), "model_output": torch.ones(SHAPE), "table": make_table().packed("cpu"), "t": 0}
    with pytest.raises(ValueError, match=message):
        reference.step_with_options(**good | inputs)
