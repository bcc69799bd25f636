"""The noise contract: Philox's published vectors, the formula in float64, statistics, published bits, arguments."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given

import ddpm_ext
from ddpm_ext import Philox, reference
from ddpm_ext._extension import C

# Random123's kat_vectors, "philox4x32 10": counter, key, result.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# seed, ids, stream, draw
SOURCES = [
    (0, [0, 1, 2], 0, 0),
    (1, [7, 7, 8], 1, 999),
    (2**63, [0, 2**32 - 1, 2**32], 2, 2**32 - 1),
    (2**64 - 1, [2**56 - 1, 2**55, 2**40 + 3], 255, 2**31),
    (0x0123456789ABCDEF, [5, 2**33, 2**48 + 1], 16, 12345),
]

word = st.integers(0, 2**32 - 1)


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def philox(counter: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Salmon et al. 2011 in numpy; words as uint64."""
    c0, c1, c2, c3 = counter
    low32, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(10):
        k0 = np.uint64((seed % 2**32 + i * 0x9E3779B9) % 2**32)
        k1 = np.uint64((seed // 2**32 + i * 0xBB67AE85) % 2**32)
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low32, (p0 >> half) ^ c3 ^ k1, p0 & low32
    return [c0, c1, c2, c3]


def uniform(w: np.ndarray) -> np.ndarray:
    # the sum is exact in float64, so that its rounding to float32 is the fma's
    return (w.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)


def contract(numel: int, seed: int, ids: list[int], stream: int, draw: int) -> np.ndarray:
    """z of the contract in float64, (batch, numel)."""
    rows = []
    for sample in ids:
        blocks = np.arange((numel + 3) // 4, dtype=np.uint64)
        rest = [draw, sample % 2**32, sample // 2**32 + stream * 2**24]
        w = philox([blocks, *(np.full_like(blocks, word) for word in rest)], seed)
        z = []
        for first, second in ((w[0], w[1]), (w[2], w[3])):
            radius = np.sqrt(-2 * np.log(uniform(first)))
            angle = second.astype(np.float64) * (2 * np.pi / 2**32)
            z += [radius * np.cos(angle), radius * np.sin(angle)]
        rows.append(np.stack(z, -1).reshape(-1)[:numel])
    return np.stack(rows)


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_philox_gives_the_published_vectors(counter, key, result):
    counter, key, result = words(counter), words(key), words(result)
    assert C.philox4x32(counter, key) == result
    assert reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == result
    mine = philox([np.array([w], dtype=np.uint64) for w in counter], key[0] + key[1] * 2**32)
    assert [int(w[0]) for w in mine] == result


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_both_philox_agree(counter, key):
    assert C.philox4x32(counter, key) == reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()


def test_reference_philox_broadcasts():
    counter = torch.randint(2**32, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    key = torch.tensor([123, 456])
    w = reference.philox4x32(counter, key)
    assert w.shape == counter.shape
    assert w[2, 3].tolist() == C.philox4x32(counter[2, 3].tolist(), key.tolist())


@pytest.mark.parametrize(("seed", "ids", "stream", "draw"), SOURCES)
def test_randn_is_the_contracts_formula(seed, ids, stream, draw):
    numel = 700_001  # 10^7 draws over the five sources
    truth = contract(numel, seed, ids, stream, draw)
    rng = Philox(seed, torch.tensor(ids), draw=draw, stream=stream)
    z = ddpm_ext.randn((3, numel), rng).numpy()
    # the contract's bound; measured worst 7.8e-7 here, 1.07e-6 in test_normal.py
    assert np.abs(z - truth).max() <= 2e-6
    assert np.abs(truth).max() > 4.5  # the tails were met
    z = reference.randn((3, numel), rng, dtype=torch.float64).numpy()
    assert np.abs(z - truth).max() <= 1e-14  # measured worst 8.9e-16, one rounding


def test_randn_counts_ids_from_the_first():
    first = 2**32 - 2
    counted = ddpm_ext.randn((5, 33), Philox(3, first))
    named = ddpm_ext.randn((5, 33), Philox(3, torch.arange(first, first + 5)))
    assert torch.equal(counted, named)
    truth = contract(33, 3, list(range(first, first + 5)), 0, 0)
    np.testing.assert_allclose(counted.numpy(), truth, rtol=0, atol=2e-6)


# The contract's published bits: seed, first id, stream, draw, and elements 0 to 4 of two samples.
BITS = {
    (0, 0, 0, 0): (
        "0x1.fb7666p-1 -0x1.d96d5ep-1 -0x1.3c3740p-1 -0x1.eda366p-2 -0x1.3aa6a4p-3",
        "0x1.114d96p+0 -0x1.b38d6ap-2 -0x1.2f19bep+1 -0x1.da1b0ap-3 0x1.9eaf9ap-2",
    ),
    (0x243F6A8885A308D3, 2**40 + 5, 2, 999): (
        "-0x1.57dafcp-1 0x1.2b898ep-1 -0x1.9a5a54p+0 0x1.b403ecp-1 0x1.ede068p-2",
        "-0x1.80dd40p-2 -0x1.6faddcp+0 -0x1.e5e504p-6 0x1.1de962p-1 -0x1.80f9b0p-1",
    ),
    (2**64 - 1, 2**56 - 2, 255, 2**32 - 1): (
        "0x1.f4ca9cp-1 -0x1.c7ba68p+0 0x1.aa3e72p-1 0x1.c1a046p-2 0x1.5271acp+0",
        "-0x1.dcc8dep-3 -0x1.0bbc5ap-2 0x1.37f2f2p-2 0x1.a0718cp-1 -0x1.6d7a6cp-1",
    ),
}


@pytest.mark.parametrize("source", BITS)
def test_published_bits(source):
    """No later change may alter the noise: these are its values, not a snapshot to be renewed."""
    seed, first, stream, draw = source
    published = [[float.fromhex(v) for v in line.split()] for line in BITS[source]]
    np.testing.assert_allclose(published, contract(5, seed, [first, first + 1], stream, draw), rtol=0, atol=2e-6)
    assert ddpm_ext.randn((2, 5), Philox(seed, first, stream=stream, draw=draw)).tolist() == published


# ----------------------------------------------------------------------------------------------- statistics


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return ddpm_ext.randn((10, 400_000), Philox(20)).double().numpy()


def test_moments(normals):
    z, n = normals.ravel(), normals.size
    # standard errors of a normal sample's moments; 4 of them: one seed in 4,000 fails all four
    assert abs(z.mean()) < 4 * n**-0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(scipy.stats.skew(z)) < 4 * (6 / n) ** 0.5
    assert abs(scipy.stats.kurtosis(z)) < 4 * (24 / n) ** 0.5


def test_distribution(normals):
    assert scipy.stats.kstest(normals.ravel(), "norm").pvalue > 1e-3
    for lane in range(4):  # an element's place in its block
        assert scipy.stats.kstest(normals[:, lane::4].ravel(), "norm").pvalue > 1e-3


def test_tails(normals):
    z = np.abs(normals.ravel())
    for bound in (2, 3, 4, 4.5):
        expected = z.size * 2 * scipy.stats.norm.sf(bound)
        assert abs((z > bound).sum() - expected) < 4 * expected**0.5


LENGTH = 1_000_000


def line(shift: int = 0, *, step: int = 1, sample: int = 0, seed: int = 5, **source: int) -> np.ndarray:
    """Elements of one sample from `shift` on."""
    rng = Philox(seed, sample, **source)
    return ddpm_ext.randn((1, LENGTH + 8), rng).double().numpy()[0, shift : shift + LENGTH : step]


def small(first: int) -> np.ndarray:
    """Samples of eight elements each."""
    return ddpm_ext.randn((LENGTH // 8, 8), Philox(5, first)).double().numpy().ravel()


# Pairs of arrays whose elements at the same place must have nothing to do with each other.
PAIRS = {
    **{f"elements {lag} apart": lambda lag=lag: (line(), line(lag)) for lag in (1, 2, 3, 4, 5, 8)},
    **{
        f"elements {k} and {i} of a block": lambda i=i, k=k: (line(k, step=4), line(i, step=4))
        for i in range(4)
        for k in range(i)
    },
    "samples": lambda: (line(), line(sample=1)),
    "samples 2^32 apart": lambda: (line(), line(sample=2**32)),
    "small neighbouring samples": lambda: (small(0), small(1)),
    "draws": lambda: (line(), line(draw=1)),
    "draws 2^31 apart": lambda: (line(), line(draw=2**31)),
    "streams": lambda: (line(), line(stream=1)),
    "seeds": lambda: (line(), line(seed=6)),
    "seeds 2^32 apart": lambda: (line(), line(seed=5 + 2**32)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_no_correlation(name):
    a, b = PAIRS[name]()
    # of the values and of their squares, which Box-Muller's radius has in common where it goes wrong
    for x, y in ((a, b), (a**2, b**2)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 * len(a) ** -0.5


def test_no_two_sources_meet():
    sources = [
        (seed, sample, stream, draw)
        for seed in (0, 1, 2**32, 2**63, 2**64 - 1)
        for sample in (0, 1, 2**24, 2**32 - 1, 2**32, 2**55, 2**56 - 1)
        for stream in (*range(17), 128, 255)
        for draw in (0, 1, 2**24, 2**32 - 1)
    ]
    seen = {
        ddpm_ext.randn((1, 8), Philox(seed, sample, stream=stream, draw=draw)).numpy().tobytes()
        for seed, sample, stream, draw in sources
    }
    assert len(seen) == len(sources)


# ------------------------------------------------------------------------------------------------ arguments


def test_own_draw_and_stream_and_those_of_the_call():
    plain = ddpm_ext.randn((2, 9), Philox(1))
    other = ddpm_ext.randn((2, 9), Philox(1), draw=3, stream=4)
    assert not torch.equal(plain, other)
    assert torch.equal(plain, ddpm_ext.randn((2, 9), Philox(1, draw=0, stream=0)))
    assert torch.equal(other, ddpm_ext.randn((2, 9), Philox(1, draw=3, stream=4)))
    assert torch.equal(other, ddpm_ext.randn((2, 9), Philox(1, draw=8, stream=9), draw=3, stream=4))


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_seed_may_be_a_tensor_of_its_64_bits(seed):
    bits = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    for randn in (ddpm_ext.randn, reference.randn):
        assert torch.equal(randn((2, 9), Philox(bits)), randn((2, 9), Philox(seed)))


def test_manual_seed_repeats_the_noise_of_no_rng():
    torch.manual_seed(11)
    first, second = ddpm_ext.randn((2, 64)), ddpm_ext.randn((2, 64))
    torch.manual_seed(11)
    assert torch.equal(ddpm_ext.randn((2, 64)), first)
    assert torch.equal(ddpm_ext.randn((2, 64)), second)
    assert not torch.equal(first, second)
    torch.manual_seed(12)
    assert not torch.equal(ddpm_ext.randn((2, 64)), first)


def test_randn_with_an_rng_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    ddpm_ext.randn((2, 64), Philox(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_randn_makes_shape_and_dtype(dtype):
    for shape in [(3,), (0, 4), (2, 0, 5), (2, 3, 4, 5, 6)]:
        z = ddpm_ext.randn(shape, Philox(0), dtype=dtype)
        assert z.shape == shape and z.dtype == dtype and z.is_contiguous()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1,), {}, ValueError, "seed is -1"),
        ((2**64,), {}, ValueError, "seed is 18446744073709551616"),
        ((1.0,), {}, TypeError, "seed is 1.0"),
        ((True,), {}, TypeError, "seed is True"),
        (("0",), {}, TypeError, "seed is '0'"),
        ((None,), {}, TypeError, "seed is None"),
        ((torch.tensor([1]),), {}, TypeError, r"seed .*\(1,\)"),
        ((torch.tensor(1, dtype=torch.int32),), {}, TypeError, "seed .*int32"),
        ((0, -1), {}, ValueError, "sample_ids is -1"),
        ((0, 2**56), {}, ValueError, "sample_ids is"),
        ((0, 0.0), {}, TypeError, "sample_ids is 0.0"),
        ((0, [0, 1]), {}, TypeError, "sample_ids is"),
        ((0, torch.tensor(3)), {}, TypeError, r"sample_ids .*\(\)"),
        ((0, torch.zeros(2)), {}, TypeError, "sample_ids .*float32"),
        ((0,), {"draw": -1}, ValueError, "draw is -1"),
        ((0,), {"draw": 2**32}, ValueError, "draw is"),
        ((0,), {"draw": 1.0}, TypeError, "draw is 1.0"),
        ((0,), {"stream": -1}, ValueError, "stream is -1"),
        ((0,), {"stream": 256}, ValueError, "stream is 256"),
        ((0,), {"stream": "0"}, TypeError, "stream is '0'"),
    ],
)
def test_philox_checks_its_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Philox(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((), {}, ValueError, r"shape is \(\)"),
        ((2, -1), {}, ValueError, "shape is .*-1"),
        ((2, 1.5), {}, TypeError, "shape"),
        (5, {}, TypeError, "int"),
        ((2, 3), {"dtype": torch.float64}, TypeError, "dtype .*expected float32"),
        ((2, 3), {"dtype": torch.int64}, TypeError, "dtype"),
        ((2, 3), {"dtype": "float32"}, TypeError, "dtype"),
        ((2, 3), {"device": "meta"}, ValueError, "device is on meta, expected cpu or cuda"),
        ((2, 3), {"rng": 0}, TypeError, "rng is a int, expected a ddpm_ext.Philox"),
        ((2, 3), {"rng": torch.Generator()}, TypeError, "rng is a Generator"),
        ((2, 3), {"rng": Philox(0, 2**56 - 1)}, ValueError, "sample_ids start at .* batch of 2"),
        ((2, 3), {"rng": Philox(0, torch.arange(3))}, ValueError, "sample_ids has shape .*3.*expected .*2"),
        ((2, 3), {"rng": Philox(0, torch.tensor([0, -1]))}, ValueError, r"sample_ids\[1\] is -1"),
        ((2, 3), {"rng": Philox(0, torch.tensor([2**56, 0]))}, ValueError, r"sample_ids\[0\] is"),
        ((2, 3), {"draw": -1}, ValueError, "draw is -1"),
        ((2, 3), {"draw": 2**32}, ValueError, "draw is"),
        ((2, 3), {"draw": 0.5}, TypeError, "draw is 0.5"),
        ((2, 3), {"stream": 256}, ValueError, "stream is 256"),
    ],
)
def test_randn_checks_its_arguments(shape, options, error, message):
    with pytest.raises(error, match=message):
        ddpm_ext.randn(shape, **options)


def test_last_ids_are_taken():
    z = ddpm_ext.randn((2, 5), Philox(0, 2**56 - 2))
    truth = contract(5, 0, [2**56 - 2, 2**56 - 1], 0, 0)
    np.testing.assert_allclose(z.numpy(), truth, rtol=0, atol=2e-6)
