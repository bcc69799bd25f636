"""The CUDA kernels of x_start_scale and output_scale, run on the CPU by the stand-in for CUDA's runtime: bit for bit
what the CPU's kernels compute, by whatever order of threads."""

from __future__ import annotations

import math

import pytest
import torch
from support.cuda_host.calls import PAIRS, WIDE, assert_same_bits, values
from support.step_inputs import make_table

from ddpm_ext.ops.extension import C

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = make_table(8)
ROWS = torch.tensor([3, 0, 1, 2, 7])


def threshold(module, x, m=None, u=None, scale=None, *, quantile=0.9, t=None, index=1, maximum=math.inf):
    table = None if m is None else TABLE
    return module.x_start_scale(x, m, table, t, index, quantile, maximum, u, scale)


def spread(module, m, u):
    return module.output_scale(m, u, 3.0, 0.7)


def check(host, call, *tensors, **options):
    expected = call(C, *tensors, **options)
    assert_same_bits(call(host.operators, *tensors, **options), expected, f"{tensors[0].shape} {options}")
    return expected


pairs = pytest.mark.parametrize("pair", PAIRS, ids=str)


@pairs
@pytest.mark.parametrize("quantile", [1e-9, 0.3, 0.995, 1.0])
def test_threshold(host, pair, quantile):
    """Parts of a block and several blocks a sample; with the model's output, guidance and its factor, and without."""
    for count in (1, 2, 3, 5, 64, 1023, 1026, 9000, 40_001):
        batch = 1 if count > 10_000 else 5
        x, m, u = (values(batch, count, seed=i, dtype=pair[i > 0], special=False) for i in range(3))
        t, scale = (ROWS, torch.tensor([0.5, 1.5, 2.0, -1.0, 0.0])) if batch == 5 else (None, None)
        check(host, threshold, x * 2, quantile=quantile)
        check(host, threshold, x, m, quantile=quantile, t=t)
        found = check(host, threshold, x, m, u, scale, quantile=quantile, t=t, maximum=7.0)
        assert (found >= 0.142).all() and (found <= 1).all()


@pairs
def test_spread(host, pair):
    """Whole chunks, parts of one, several blocks a sample."""
    for count in (2, 3, 5, 64, 511, 512, 513, 2051, 70_000):
        m, u = (values(1 if count > 10_000 else 5, count, seed=i, dtype=pair[1], special=False) for i in range(2))
        assert check(host, spread, m, u).isfinite().all()


@pairs
@pytest.mark.parametrize("layout", ["offset", "transposed", "sliced", "expanded"])
def test_layouts(host, pair, layout):
    def lay(x):
        if layout == "offset":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack([x, x], -1)[..., 0] if layout == "sliced" else x[:, :, :1].expand(x.shape)

    x, m, u = (lay(values(3, 20, 37, seed=i, dtype=pair[i > 0], special=False)) for i in range(3))
    t = torch.stack([ROWS, ROWS], 1)[:3, 0]
    check(host, threshold, x, m, u, t=t)
    check(host, threshold, x, m.contiguous(), None, torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])[:, 0])
    check(host, spread, m, u)
    check(host, spread, m.contiguous(), u)


def test_special_numbers(host):
    """NaN, infinite, tiny and equal magnitudes, and samples whose quantile lies between two of them."""
    x = values(6, 90, seed=3)
    x[1] = x[1].nan_to_num(2.0)
    x[2, ::3], x[3], x[4], x[5] = math.inf, 1.5, 0.0, torch.linspace(-8, 8, 90).round()
    for quantile in (0.2, 0.66, 0.995, 1.0):
        check(host, threshold, x, quantile=quantile)
        check(host, threshold, x.reshape(-1, 1), quantile=quantile)
    check(host, spread, x, x.roll(1, 1))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_threads(host, seed):
    """The block that comes last finishes a sample, whichever it is, and leaves the counts as it found them."""
    x, m, u = (values(2, 30_000, seed=i, dtype=WIDE, special=False) for i in range(3))
    expected = threshold(C, x, m, u), spread(C, m, u)
    host.control.set_seed(seed)
    for _ in range(2):
        assert_same_bits(threshold(host.operators, x, m, u), expected[0], "threshold")
        assert_same_bits(spread(host.operators, m, u), expected[1], "spread")


@pairs
def test_every_sector_is_touched_once(host, pair):
    """Of aligned samples: each word that a warp reads of them, or writes of their magnitudes, is one stretch of memory.
    The last block reads all magnitudes twice, or three times where the quantile lies between two."""
    x, m, u = (values(1, 65_536, seed=i, dtype=pair[i > 0], special=False) for i in range(3))
    for quantile, passes in ((1.0, 2), (0.5, 3)):
        found = host.control.sectors_of(lambda q=quantile: threshold(host.operators, x, m, u, quantile=q))
        magnitudes = 4 * x.numel() // 32
        assert found == ((x.nbytes + m.nbytes + u.nbytes) // 32 + passes * magnitudes, magnitudes)
    assert host.control.sectors_of(lambda: spread(host.operators, m, u)) == ((m.nbytes + u.nbytes) // 32, 0)


def test_one_launch_of_every_sample(host):
    for batch, count in ((1, 40_000), (3, 2000), (70, 1)):
        x, m = (values(batch, count + 1, seed=i, dtype=WIDE) for i in range(2))
        threshold(host.operators, x, m)
        ((grid, block),) = host.control.take_launches()
        assert grid[1] * grid[2] >= batch and grid[0] <= -(-count // 8192) + 1 and block == (256, 1, 1)
        spread(host.operators, x, m)
        ((grid, block),) = host.control.take_launches()
        assert grid[1] * grid[2] >= batch and grid[0] <= -(-count // 512) + 1 and block == (128, 1, 1)
