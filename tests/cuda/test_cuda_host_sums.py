"""The CUDA kernels that reduce a sample, those of the training loss, of x_start_scale and of output_scale, run on the
CPU by the stand-in for CUDA's runtime: bit for bit what the CPU's kernels compute, by whatever order of threads. And
whose memory the counters are by which their blocks learn which of them is the last."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.cuda_host.calls import PAIRS, ROWS, STREAMS, WIDE, assert_same_bits, values

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
SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38, -3e38, 1.0])
STEP_ROWS = torch.tensor([3, 0, 1, 2, 7])  # of ROWS, for five samples
NOISES = pytest.mark.parametrize("noise", ["given", "drawn"])
pairs = pytest.mark.parametrize("pair", PAIRS, ids=str)


def loss(module, m, x, noise=None, *, kind=0, t=None, index=0, bound=False, detach=False):
    """Each sample's loss, and the slope."""
    how = (noise, None, -3, None, 2**32 - 2, 2, -1, None, 1, True, bound, detach, False)
    return module.diffusion_loss(m, x, BOUND if bound else TABLE, t, index, kind, 0.7, *how)


def threshold(module, x, m=None, u=None, scale=None, *, quantile=0.9, t=None, index=1, maximum=math.inf):
    table = None if m is None else ROWS
    return (module.x_start_scale(x, m, table, t, index, quantile, maximum, u, scale),)


def spread(module, m, u):
    return (module.output_scale(m, u, 3.0, 0.7),)


def check(host, call, *tensors, **options):
    """That both give the same bits, which are returned."""
    expected, got = call(C, *tensors, **options), call(host.operators, *tensors, **options)
    for a, b in zip(got, expected, strict=True):
        assert a.stride() == b.stride()
        assert_same_bits(a, b, f"{call.__name__} of {tensors[0].shape} {options}")
    return expected


def normals(shape, *dtypes):
    return [values(*shape, seed=seed, dtype=dtype, special=False) for seed, dtype in enumerate(dtypes)]


# ------------------------------------------------------------------------------------------------------ sizes


@pairs
@pytest.mark.parametrize("kind", [0, 1, 2])
@NOISES
def test_losses(host, pair, kind, noise):
    """Whole chunks, parts of one, several blocks a sample; with x_start and without."""
    for count in (1, 2, 3, 5, 64, 511, 512, 513, 2051, 70_000):
        batch = 1 if count > 10_000 else 5
        m, x, z = normals((batch, count), pair[1], pair[0], pair[0])
        for target in (x, None):
            if target is None and noise == "drawn" and pair[0] != pair[1]:
                continue  # nothing then tells that the samples' dtype is another
            given = z if noise == "given" else None
            assert check(host, loss, m, target, given, kind=kind, t=torch.arange(batch) % 5)[0].isfinite().all()


@pairs
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("learned", [True, False])
def test_bounds(host, pair, kind, learned):
    """Each kind of row, a variance that is the model's and one that isn't, the mean detached and not."""
    for i, shape in enumerate([(5, 1), (5, 3), (5, 1, 513), (5, 2, 37, 9), (5, 3, 4, 64)]):
        (m,) = normals((5, shape[1] * (2 if learned else 1), *shape[2:]), pair[1])
        x, z = normals(shape, pair[0], pair[0])
        how = {"kind": kind, "t": torch.arange(5), "bound": True, "detach": i % 2 == 0}
        for noise in (z, None):
            found, slope = check(host, loss, m, x.roll(1, 0).clamp(-1, 1), noise, **how)
            assert found.isfinite().all() and slope.shape == m.shape and slope.abs().max() > 0


@pairs
@pytest.mark.parametrize("quantile", [1e-9, 0.3, 0.995, 1.0])
def test_thresholds(host, pair, quantile):
    """Parts of a block, several blocks a sample, several launches; with the model's output, guidance and its factor."""
    for count in (1, 2, 3, 5, 64, 1023, 1026, 9000, 40_001):
        batch = 1 if count > 10_000 else 5
        x, m, u = normals((batch, count), pair[0], pair[1], pair[1])
        t, scale = (STEP_ROWS, torch.tensor([0.5, 1.5, 2.0, -1.0, 0.0])) if batch == 5 else (None, None)
        check(host, threshold, x * 2, quantile=quantile)
        check(host, threshold, x, m, quantile=quantile, t=t)
        (found,) = check(host, threshold, x, m, u, scale, quantile=quantile, t=t, maximum=7.0)
        assert (found >= 0.142).all() and (found <= 1).all()


@pairs
def test_spreads(host, pair):
    """Whole chunks, parts of one, several blocks a sample."""
    for count in (2, 3, 5, 64, 511, 512, 513, 2051, 70_000):
        assert check(host, spread, *normals((1 if count > 10_000 else 5, count), pair[1], pair[1]))[0].isfinite().all()


# ----------------------------------------------------------------------------------------------------- layouts


@pairs
@pytest.mark.parametrize("layout", ["offset", "transposed", "sliced", "expanded"])
def test_layouts(host, pair, layout):
    def lay(x):
        if layout == "offset":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack([x, x], -1)[..., 0] if layout == "sliced" else x[:, :, :1].expand(x.shape)

    m, x, z, u = map(lay, normals((3, 20, 37), pair[1], pair[0], pair[0], pair[1]))
    for kind, noise in itertools.product(range(3), (z, None)):
        check(host, loss, m, x, noise, kind=kind, t=torch.tensor([3, 0, 2]))
        check(host, loss, m.contiguous(), x, noise, kind=kind, index=1)
    check(host, threshold, x, m, u, t=torch.stack([STEP_ROWS, STEP_ROWS], 1)[:3, 0])
    check(host, threshold, x, m.contiguous(), None, torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])[:, 0])
    check(host, spread, m, u)
    check(host, spread, m.contiguous(), u)


def test_bounds_by_strides(host):
    """Halves of a model's output that are not neighbours in memory."""
    (m,), (x,) = normals((3, 4, 5, 7), WIDE), normals((3, 2, 5, 7), WIDE)
    x, last = x.clamp(-1, 1), m.contiguous(memory_format=torch.channels_last)
    for t in (torch.tensor([0, 1, 3]), torch.tensor([4, 2, 0])):
        expected = check(host, loss, m, x, t=t, bound=True)
        for of_m, of_x in ((last, x), (last, x.contiguous(memory_format=torch.channels_last)), (m, x.mT.clone().mT)):
            for a, b in zip(check(host, loss, of_m, of_x, t=t, bound=True), expected, strict=True):
                assert_same_bits(a.contiguous(), b, "by strides")


@pairs
@NOISES
def test_channels_last(host, pair, noise):
    """So many pixels that a block takes the chunks of all channels one after another; and one channel too many for
    that, pixels that are no whole chunks."""
    host.control.set_device(1)
    cases = ((2, 3, (64, 64), 8), (6, 16, (32, 48), 3), (4, 17, (32, 16), 8), (4, 3, (33, 31), 6))
    for batch, channels, pixels, blocks in cases:
        m, x, z = normals((batch, channels, *pixels), pair[1], pair[0], pair[0])
        arguments = x, z if noise == "given" else None
        expected = loss(C, m, *arguments, t=torch.arange(batch) % 5)
        host.control.take_launches()
        last = m.contiguous(memory_format=torch.channels_last)
        got = loss(host.operators, last, *arguments, t=torch.arange(batch) % 5)
        ((grid, _),) = host.control.take_launches()
        assert grid[0] == blocks
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.contiguous(), b)


@pairs
def test_losses_of_samples_that_are_channels_last(host, pair):
    """In all of their tensors: by words, each of whose sectors is touched once, or a second time where a warp's words
    straddle one. Elsewhere by strides: nine channels, pixels that are no whole chunks, memory that is not aligned."""
    host.control.set_device(1)  # where blocks take several turns
    t = torch.tensor([1, 3, 0])  # the second has no noise
    cases = [(2, 16, 32), (3, 32, 32), (4, 128, 64), (5, 16, 96), (7, 16, 32), (8, 64, 8)]
    for case in [*cases, (9, 16, 32), (3, 33, 31), (4, 16, 16), (4, 32, 32, 1)]:
        m, x = normals((3, *case[:3]), pair[1], pair[0])
        m, x = (y.contiguous(memory_format=torch.channels_last) for y in (m, x))
        if case not in cases and len(case) == 4:
            m = torch.empty(m.numel() + 1, dtype=m.dtype)[1:].as_strided(m.shape, m.stride()).copy_(m)
        for kind, target in ((0, x), (1, x), (2, x if pair[0] != pair[1] else None)):
            check(host, loss, m, target, kind=kind, t=t)
        read, written = host.control.sectors_of(lambda m=m, x=x: loss(host.operators, m, x, t=t))
        by_words = 0.99 * (m.nbytes + x.nbytes) <= 32 * read <= 1.14 * (m.nbytes + x.nbytes)
        assert by_words == (case in cases), case
        assert (4 * m.numel() <= 32 * written <= 1.14 * 4 * m.numel()) == by_words, case


def test_special_numbers_of_losses(host):
    special = SPECIAL.repeat(30).view(3, -1)
    for kind in range(3):
        check(host, loss, special, special.roll(1, 1), special.roll(3, 1), kind=kind)
        each = special.reshape(-1, 1)
        check(host, loss, each, None, torch.zeros_like(each), kind=kind)
    x = SPECIAL.repeat(30).view(5, 2, -1)
    m = torch.cat([x.roll(1, 2), x.roll(3, 2)], 1)
    for y in (x, torch.ones_like(x), -torch.ones_like(x)):
        check(host, loss, m, y, torch.zeros_like(x), t=torch.arange(5), bound=True)


def test_special_numbers_of_statistics(host):
    """NaN, infinite, tiny and equal magnitudes, and samples whose quantile lies between two of them."""
    x = values(6, 90, seed=3)
    x[1] = x[1].nan_to_num(2.0)
    x[2, ::3], x[3], x[4], x[5] = math.inf, 1.5, 0.0, torch.linspace(-8, 8, 90).round()
    shapes = x, x[::2, :30].reshape(-1, 1), x[::3].repeat_interleave(400, 1)
    for y, quantile in itertools.product(shapes, (0.2, 0.66, 0.995, 1.0)):
        check(host, threshold, y, quantile=quantile)
    check(host, spread, x, x.roll(1, 1))


# ----------------------------------------------------------------------------------------------------- launches


def reductions(module, batch=2):
    """The results of every operator that counts its blocks, of which each sample has several."""
    m, x, u = normals((batch, 20_000), WIDE, WIDE, WIDE)
    return *loss(module, m, x), *threshold(module, x, m, u, maximum=7.0), *spread(module, m, u)


def check_all(host, batch=2):
    for got, expected in zip(reductions(host.operators, batch), reductions(C, batch), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_threads(host, seed):
    """The block that comes last finishes a sample, whichever it is, and leaves the counts as it found them."""
    host.control.set_seed(seed)
    for _ in range(2):
        check_all(host)
        check(host, threshold, *normals((2, 33_000), WIDE, WIDE))


@pairs
@NOISES
def test_every_sector_of_a_loss_is_touched_once(host, pair, noise):
    """What a warp loads or stores at once is one stretch of memory, in float32 and in 16 bits, where it is aligned."""
    host.control.set_device(1)  # where blocks take several turns
    m, x, z = normals((2, 20_000), pair[1], pair[0], pair[0])
    read = [m, x, *([z] if noise == "given" else [])]
    assert all(t.data_ptr() % 32 == 0 for t in read)
    found = host.control.sectors_of(lambda: loss(host.operators, *read))
    assert found == (sum(t.nbytes for t in read) // 32, 4 * m.numel() // 32)


@pairs
def test_every_sector_of_a_statistic_is_touched_once(host, pair):
    """Of aligned samples: each word that a warp reads of them, or writes of their magnitudes, is one stretch of memory.
    All magnitudes are read twice, by a sample's last block or by all of them."""
    for count in (32_768, 65_536):
        x, m, u = normals((1, count), pair[0], pair[1], pair[1])
        found = host.control.sectors_of(lambda x=x, m=m, u=u: threshold(host.operators, x, m, u, quantile=0.5))
        assert found == ((x.nbytes + m.nbytes + u.nbytes) // 32 + 2 * count // 8, count // 8)
    assert host.control.sectors_of(lambda: spread(host.operators, m, u)) == ((m.nbytes + u.nbytes) // 32, 0)


def test_launches_of_every_sample(host):
    def launch(call, *tensors, **options):
        host.control.take_launches()
        call(host.operators, *tensors, **options)
        ((grid, block),) = set(found := host.control.take_launches())
        assert len(found) == (3 if call == threshold and tensors[0].shape[1] > 32_768 else 1)
        return grid, block

    for batch, count in ((1, 70_000), (3, 2000), (70, 1)):
        (m,) = normals((batch, count), WIDE)
        blocks = -(-count // (1024 if count % 4 == 0 else 512))  # by vectors a block takes two chunks at once
        assert launch(loss, m, m, t=torch.arange(batch) % 5) == ((blocks, batch, 1), (128, 1, 1))
        x, m = normals((batch, count + 1), WIDE, WIDE)
        for call, threads, elements in ((threshold, 256, 8192), (spread, 128, 512)):
            grid, block = launch(call, x, m)
            assert grid[1] * grid[2] >= batch and grid[0] <= -(-count // elements) + 1 and block == (threads, 1, 1)


# ----------------------------------------------------------------------------------------------------- counters


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("captured", [False, True])
def test_whose_memory_the_counters_are(host, captured, streams):
    """Not of torch's allocator: it may draw from a CUDA graph's pool without a capture, as torch.compile's
    "reduce-overhead" makes it do before it captures, and then gives that memory to others. A launch that is captured
    has its own, and so has one on a stream that torch has not made, whose handle may be another's as well. They are
    cleared on the stream of the launch."""
    host.control.set_capturing(captured)
    try:
        for device in (0, 0, 1, 1):
            before = host.control.allocations()
            with host.on_other_device(device, streams):
                check_all(host)
            assert (host.control.allocations() > before) == (captured or streams == "external")
            assert host.control.blocks_of_allocator() == 0
            host.control.overwrite_memory_of_allocator()
    finally:
        host.control.set_capturing(False)


def test_more_samples_than_before(host):
    """And few again, and after a launch that was refused."""
    for batch in (2, 5, 2):
        check_all(host, batch)
    host.control.set_refuse(True)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        reductions(host.operators)
    host.control.set_refuse(False)
    check_all(host)


def test_memory_that_torch_holds_unused_is_given_back_for_the_counters(host):
    """Where there is none even then, it is an error, and nothing is wrong afterwards."""
    emptied = host.control.caches_emptied()
    host.control.set_full(1)
    check_all(host, 12)
    assert host.control.caches_emptied() == emptied + 1
    host.control.set_full(2)
    with pytest.raises(RuntimeError, match="CUDA error 2: out of memory"):
        check_all(host, 25)
    check_all(host, 25)
    check_all(host)
