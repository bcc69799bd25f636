"""NaN, infinities and signed zeros behave as in torch's arithmetic and clamp; and alphas_cumprod = 0."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support.step_inputs import make_row

from ddpm_ext import ops, reference
from ddpm_ext.tables.predictions import PREDICTIONS, Levels

BACKENDS = pytest.mark.parametrize("backend", [ops, reference])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
INF, NAN = math.inf, math.nan
VALUES = [0.0, -0.0, 1.0, -2.5, 1e-7, 1000.0, INF, -INF, NAN]


def step_table(device: torch.device, *rows: tuple[float, ...]) -> torch.Tensor:
    """A step table with rows of a, b, c0, c1, c2 and s, all with draw 0."""
    names = ("a", "b", "c0", "c1", "c2", "s")
    return torch.cat([make_row(**dict(zip(names, row, strict=True))) for row in rows]).to(device)


def combinations(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All combinations of VALUES, each tensor of shape (count, 1, ...)."""
    listed = torch.tensor(list(itertools.product(VALUES, repeat=count)), dtype=dtype, device=device)
    return listed.T.contiguous().unsqueeze(1)


def step(x, m, z, row, clip):
    """The equation in float64. c2 m is left out if c2 is 0, since m may be infinite and x0 finite by the clip."""
    a, b, c0, c1, c2, s = row
    with np.errstate(invalid="ignore"):
        start = a * x + b * m
        if clip is not None:
            start = np.clip(start, *clip)  # NaN stays NaN
        prev = c0 * start + c1 * x + (c2 * m if c2 != 0 else 0.0)
        return prev if z is None else prev + s * z


ROWS = [
    (1.5, -0.5, 0.25, 0.75, 0.0, 0.5),
    (1.5, -0.5, 0.25, 0.75, -0.5, 0.5),
    (0.0, 1.0, 0.25, 0.75, 0.0, 0.0),
    (1.5, -0.5, 0.25, 0.0, 0.0, 0.0),
]


@BACKENDS
@DTYPES
@pytest.mark.parametrize(
    ("row", "clip"),
    [*((row, (-1.0, 1.0)) for row in ROWS), (ROWS[1], None), (ROWS[0], (-INF, 0.5)), (ROWS[1], (0.0, INF))],
)
def test_special_values_in_every_place(backend, dtype, clip, row, device):
    x, m, z = combinations(3, dtype, device)
    for noise in (None, z):
        got = backend.reverse_step(x, m, step_table(device, row), 0, clip=clip, noise=noise, add_noise=False)
        with np.errstate(over="ignore"):
            truth = step(*(v if v is None else v.double().cpu().numpy() for v in (x, m, noise)), row, clip)
        # NaN and infinities are in the same places; the margin is for terms of 1000 that cancel
        tolerance = {torch.float32: 2e-4, torch.float16: 1, torch.bfloat16: 8}[dtype]
        np.testing.assert_allclose(got.double().cpu().numpy(), truth, rtol=0, atol=tolerance)


@BACKENDS
def test_special_values_of_affine(backend, device):
    x, y = combinations(2, torch.float32, device)
    table = torch.tensor([[0.5, -2.0]], device=device)
    truth = 0.5 * x.double() - 2.0 * y.double()
    for got in (
        backend.forward_process(x, table, 0, noise=y),
        backend.predict_start(x, y, table, 0),
        backend.posterior_mean(x, y, table, 0),
    ):
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6, equal_nan=True)
    without = backend.forward_process(x, table, 0, add_noise=False)
    torch.testing.assert_close(without, 0.5 * x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-1.0, -0.0), (0.0, 0.0)])
def test_a_bound_of_zero_leaves_zeros_their_sign(clip, device):
    x = torch.tensor([[0.0, -0.0] * 20], device=device)
    got = ops.reverse_step(x, x, step_table(device, (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)), 0, clip=clip, add_noise=False)
    assert torch.equal(got.signbit(), x.signbit())


@BACKENDS
def test_infinities_stay_where_nothing_is_known(backend, device):
    """mask known + (1 - mask) x, as torch computes it."""
    x = torch.tensor([[INF, -INF, 2.0, INF, INF, NAN]], device=device)
    mask = torch.tensor([[0.0, 0.0, 0.25, 0.25, 1.0, 0.0]], device=device)
    known = torch.ones_like(x)
    row = make_row(c1=1.0, signal_after=1.0).to(device)
    options = {"clip": None, "add_noise": False, "x_start": torch.zeros_like(x)}
    got = backend.step_with_options(x, None, row, 0, known=known, mask=mask, **options)
    torch.testing.assert_close(got, mask * known + (1 - mask) * x, rtol=0, atol=0, equal_nan=True)
    assert got.flatten().tolist()[:4] == [INF, -INF, 1.75, INF]


@BACKENDS
def test_16_bit_results_overflow_to_infinity(backend, device):
    x = torch.tensor([[60000.0, -60000.0, 65519.0, 65520.0]], device=device)
    table = torch.tensor([[1.0, 0.0], [2.0, 0.0]], device=device)
    half = x.half()
    assert backend.forward_process(half, table, 1, add_noise=False).tolist() == [[INF, -INF, INF, INF]]
    # 65519 rounds to the largest number and 65520 to infinity, as in torch
    from_float32 = backend.forward_process(half[:, :3], table, 0, add_noise=False)
    assert from_float32.tolist() == [[60000.0, -60000.0, 65504.0]]


@BACKENDS
def test_without_signal_x0_is_the_sign_of_x_minus_m(backend, normal, device):
    """If alphas_cumprod is 0 and the model predicts eps, also for x = m."""
    a, b = (float(v) for v in PREDICTIONS["eps"].x0(Levels(*torch.zeros(3, 1, dtype=torch.float64))))
    x, i = normal(1, 999), torch.arange(999, device=device)
    m = torch.stack([x, x.nextafter(x + 1), x.nextafter(x - 1)])[i % 3, 0, i][None]
    start = backend.reverse_step(x, m, step_table(device, (a, b, 1.0, 0.0, 0.0, 0.0)), 0, add_noise=False)
    assert torch.equal(start, (x - m).sign())
