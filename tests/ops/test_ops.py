"""The operators and their twins in `reference` against float64, for many shapes, strides, dtypes and kinds of noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.choices import Choose, for_many
from support.operators import CLIPS, Inputs, assert_near, columns, each, host, row_numbers

from ddpm_ext import ops, reference
from ddpm_ext.ops.row import ROW


def random_table(choose: Choose, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(choose.integer(0, 99, "table"))
    return torch.randn(7, 2, generator=generator).to(device)


@for_many()
def test_reverse_step(make_step_table, device, choose):
    table = make_step_table(7, seed=choose.integer(0, 99, "table"))
    inputs = Inputs(choose, len(table), device)
    x_t, model_output, t = inputs.tensor(inputs.x_dtype), inputs.tensor(inputs.y_dtype), inputs.t()
    clip = choose.one_of(CLIPS, "clip")
    draws = table.view(torch.int32)[:, ROW.index("draw")].long().cpu().numpy()[each(t, inputs.batch)] % 2**32
    z, options, drawn = inputs.noise(draws, stream=0)

    x, m = host(x_t), host(model_output)
    row = row_numbers(table, t, x)
    parts, s = (row["a"] * x, row["b"] * m), row["s"]
    start, start_size = sum(parts), row["c0"] * sum(map(np.abs, parts))
    if clip is not None:
        start = np.clip(start, *clip)
    # a clipped x0 is no larger than the bound, but has the error of its terms
    terms = [row["c0"] * start, row["c1"] * x, row["c2"] * m, start_size, -start_size]
    if z is not None:
        terms.append(s * z)
    before = x_t.clone(), model_output.clone(), table.view(torch.int32).clone()
    for backend in (ops, reference):
        got = backend.reverse_step(x_t, model_output, table, t, clip=clip, **options)
        assert got.shape == x_t.shape and got.dtype == x_t.dtype and got.device == device
        assert_near(got, terms, np.abs(s) if drawn else 0.0)
    assert all(torch.equal(*pair) for pair in zip(before, (x_t, model_output, table.view(torch.int32)), strict=True))


def test_opposite_factors_of_large_numbers_leave_no_rounding(make_step_table, device):
    """Where alphas_cumprod is nearly 0, x0 = a x - a m is far smaller than its products, and than their rounding."""
    table = make_step_table(1, seed=0)
    a = 340_999.53
    table[0, ROW.index("a")], table[0, ROW.index("b")] = a, -a
    m = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(device)
    x_t = m + 1e-6
    x_start = np.float64(np.float32(a)) * (host(x_t) - host(m))
    for backend in (ops, reference):
        kept = torch.empty_like(x_t)
        backend.step_with_options(x_t, m, table, 0, clip=None, x0_out=kept)
        np.testing.assert_allclose(host(kept), x_start, rtol=1e-6)
        row = row_numbers(table, 0, host(x_t))
        plain = backend.reverse_step(x_t, m, table, 0, clip=None)
        expected = row["c0"] * x_start + row["c1"] * host(x_t) + row["c2"] * host(m)
        np.testing.assert_allclose(host(plain), expected, atol=1e-5)


@for_many()
def test_forward_process(device, choose):
    table = random_table(choose, device)
    inputs = Inputs(choose, len(table), device)
    x_start, t = inputs.tensor(inputs.x_dtype), inputs.t()
    z, options, drawn = inputs.noise(each(t, inputs.batch), stream=2)

    x = host(x_start)
    k0, k1 = columns(table, t, x)
    before = x_start.clone(), table.clone()
    for backend in (ops, reference):
        got = backend.forward_process(x_start, table, t, **options)
        assert got.shape == x_start.shape and got.dtype == x_start.dtype and got.device == device
        assert_near(got, [k0 * x] if z is None else [k0 * x, k1 * z], np.abs(k1) if drawn else 0.0)
    assert all(torch.equal(*pair) for pair in zip(before, (x_start, table), strict=True))


@pytest.mark.parametrize("name", ["predict_start", "posterior_mean"])
@for_many()
def test_affine(name, device, choose):
    table = random_table(choose, device)
    inputs = Inputs(choose, len(table), device)
    first, second, t = inputs.tensor(inputs.x_dtype), inputs.tensor(inputs.y_dtype), inputs.t()
    x, y = host(first), host(second)
    k0, k1 = columns(table, t, x)
    for backend in (ops, reference):
        got = getattr(backend, name)(first, second, table, t)
        assert got.shape == first.shape and got.dtype == first.dtype and got.device == device
        assert_near(got, [k0 * x, k1 * y])
