"""The training loss's CUDA kernel, run on the CPU by the stand-in for CUDA's runtime: bit for bit what the CPU's kernel
computes, sums included, by whatever order of threads."""

from __future__ import annotations

import pytest
import torch
from support.cuda_host.calls import PAIRS, assert_same_bits

from ddpm_ext.ops.extension import C

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
TABLE[3, 1] = 0  # a row whose noise is not worth drawing
# k0, k1, weight, vlb_weight, l0, l1, scale, decoder: of a posterior's rows, and of a decoder's, narrow and wide
BOUND = torch.tensor(
    [
        [0.0, 1.0, 1.0, 1.4, -9.5, 0.3, -0.01, 1.0],
        [0.6, -0.8, 0.5, 0.7, 0.4, 0.35, 5.0, 0.0],
        [0.0, 1.0, 0.0, 3.0, 0.02, 0.0, 0.3, 0.0],
        [1.0, 0.0, 1.0, 1.0, -2.0, 1.0, 1.0, 1.0],
        [0.0, 0.5, 2.0, 0.1, -4.0, 2.0, 10.0, 0.0],
    ]
)
INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-40, -1e-45, 3e38, -3e38, 1.0])


def normal(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(module, m, x, noise, *, kind, t=None, index=0, reduction=1, seed=-3, bound=False, detach=False):
    rng = (None, seed, None, 2**32 - 2, 2, -1, None)
    table = BOUND if bound else TABLE
    return module.diffusion_loss(m, x, table, t, index, kind, 0.7, noise, *rng, reduction, True, bound, detach, False)


def check(host, *tensors, **options):
    expected, got = call(C, *tensors, **options), call(host.operators, *tensors, **options)
    for name, a, b in zip(("loss", "slope"), got, expected, strict=True):
        assert a.stride() == b.stride()
        assert_same_bits(a, b, f"{name} {options}")
    return expected


pairs = pytest.mark.parametrize("pair", PAIRS, ids=str)


@pairs
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_sizes(host, pair, kind, noise):
    """Whole chunks, parts of one, several blocks a sample; with x_start and without."""
    for count in (1, 2, 3, 5, 64, 511, 512, 513, 2051, 70_000):
        batch = 1 if count > 10_000 else 5
        m, x, z = (normal(batch, count, seed=i, dtype=pair[i == 0]) for i in range(3))
        t = torch.arange(batch) % 5
        for target in (x, None):
            if target is None and noise == "drawn" and pair[0] != pair[1]:
                continue  # nothing then tells that the samples' dtype is another
            loss, _ = check(host, m, target, z if noise == "given" else None, kind=kind, t=t)
            assert loss.isfinite().all()


@pairs
@pytest.mark.parametrize("layout", ["offset", "transposed", "sliced", "expanded"])
def test_layouts(host, pair, layout):
    def lay(x):
        if layout == "offset":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack([x, x], -1)[..., 0] if layout == "sliced" else x[:, :, :1].expand(x.shape)

    m, x, z = (lay(normal(3, 20, 37, seed=i, dtype=pair[i == 0])) for i in range(3))
    for kind in range(3):
        for noise in (z, None):
            check(host, m, x, noise, kind=kind, t=torch.tensor([3, 0, 2]))
            check(host, m.contiguous(), x, noise, kind=kind, index=1)


@pairs
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("learned", [True, False])
def test_bound(host, pair, kind, learned):
    """Each kind of row, a variance that is the model's and one that isn't, the mean detached and not."""
    t = torch.arange(5)
    for i, shape in enumerate([(5, 1), (5, 3), (5, 1, 513), (5, 2, 37, 9), (5, 3, 4, 64)]):
        channels = shape[1] * (2 if learned else 1)
        m = normal(5, channels, *shape[2:], seed=i, dtype=pair[1]) * 2
        x, z = (normal(*shape, seed=i + j, dtype=pair[0]) for j in (1, 2))
        for noise in (z, None):
            loss, slope = check(host, m, x.clamp(-1, 1), noise, kind=kind, t=t, bound=True, detach=i % 2 == 0)
            assert loss.isfinite().all() and slope.shape == m.shape and slope.abs().max() > 0


def test_bound_by_strides(host):
    """Halves of a model's output that are not neighbours in memory."""
    x = normal(3, 2, 5, 7, seed=1, dtype=torch.float32).clamp(-1, 1)
    m = normal(3, 4, 5, 7, seed=0, dtype=torch.float32)
    last = m.contiguous(memory_format=torch.channels_last)
    for t in (torch.tensor([0, 1, 3]), torch.tensor([4, 2, 0])):
        for of_m, of_x in ((last, x), (last, x.contiguous(memory_format=torch.channels_last)), (m, x.mT.clone().mT)):
            expected = check(host, m, x, None, kind=0, t=t, bound=True)
            for a, b in zip(check(host, of_m, of_x, None, kind=0, t=t, bound=True), expected, strict=True):
                assert_same_bits(a.contiguous(), b, "by strides")


@pairs
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_channels_last(host, pair, noise):
    """So many pixels that a block takes the chunks of all channels one after another; and one channel too many for
    that, pixels that are no whole chunks."""
    host.control.set_device(1)
    cases = ((2, 3, (64, 64), 8), (6, 16, (32, 48), 3), (4, 17, (32, 16), 8), (4, 3, (33, 31), 6))
    for batch, channels, pixels, blocks in cases:
        m, x, z = (normal(batch, channels, *pixels, seed=i, dtype=pair[i == 0]) for i in range(3))
        given, t = z if noise == "given" else None, torch.arange(batch) % 5
        expected = call(C, m, x, given, kind=0, t=t)
        host.control.take_launches()
        got = call(host.operators, m.contiguous(memory_format=torch.channels_last), x, given, kind=0, t=t)
        ((grid, _),) = host.control.take_launches()
        assert grid[0] == blocks
        for name, a, b in zip(("loss", "slope"), got, expected, strict=True):
            assert_same_bits(a.contiguous(), b, name)


def test_bound_of_special_numbers(host):
    x = SPECIAL.repeat(30).view(5, 2, -1)
    m = torch.cat([x.roll(1, 2), x.roll(3, 2)], 1)
    for y in (x, torch.ones_like(x), -torch.ones_like(x)):
        check(host, m, y, torch.zeros_like(x), kind=0, t=torch.arange(5), bound=True)


def test_special_numbers(host):
    special = SPECIAL.repeat(30).view(3, -1)
    for kind in range(3):
        check(host, special, special.roll(1, 1), special.roll(3, 1), kind=kind)
        each = special.reshape(-1, 1)
        check(host, each, None, torch.zeros_like(each), kind=kind)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_threads(host, seed):
    """The block that comes last finishes a sample, whichever it is."""
    m, x = (normal(2, 6000, seed=i, dtype=torch.float32) for i in range(2))
    expected = call(C, m, x, None, kind=0)
    host.control.set_seed(seed)
    assert_same_bits(call(host.operators, m, x, None, kind=0)[0], expected[0], "loss")


@pairs
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_every_sector_is_touched_once(host, pair, noise):
    """What a warp loads or stores at once is one stretch of memory, in float32 and in 16 bits, where it is aligned."""
    host.control.set_device(1)  # where blocks take several turns
    m, x, z = (normal(2, 20_000, seed=i, dtype=pair[i == 0]) for i in range(3))
    read = [m, x, *([z] if noise == "given" else [])]
    given = z if noise == "given" else None
    assert all(t.data_ptr() % 32 == 0 for t in read)
    loaded, stored = host.control.sectors_of(lambda: call(host.operators, m, x, given, kind=0))
    assert (loaded, stored) == (sum(t.nbytes for t in read) // 32, 4 * m.numel() // 32)


def test_one_launch_of_every_sample(host):
    for batch, count in ((1, 70_000), (3, 2000), (70, 1)):
        m = normal(batch, count, seed=0, dtype=torch.float32)
        host.control.take_launches()
        check(host, m, m, None, kind=0, t=torch.arange(batch) % 5)
        ((grid, block),) = host.control.take_launches()
        vectors = count % 4 == 0
        assert grid == (-(-count // (1024 if vectors else 512)), batch, 1) and block == (128, 1, 1)
