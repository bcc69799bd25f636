"""The noise contract: Philox's published vectors, the formula in float64, published bits, arguments."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import pytest
import torch
from support.devices import moved

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox, reference
from ddpm_ext.ops.extension import C

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


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def on(device: torch.device, *lists: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(numbers, device=device) for numbers in lists]


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
    # the sum is exact in float64, so that its rounding to float32 gives the result of an fma
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
def test_philox_gives_the_published_vectors(counter, key, result, device):
    counter, key, result = words(counter), words(key), words(result)
    assert C.philox4x32(counter, key) == result
    assert reference.philox4x32(*on(device, counter, key)).tolist() == result
    mine = philox([np.array([w], dtype=np.uint64) for w in counter], key[0] + key[1] * 2**32)
    assert [int(w[0]) for w in mine] == result


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "ids", "stream", "draw"), SOURCES)
def test_randn_is_the_contracts_formula(seed, ids, stream, draw, device):
    numel = 700_001  # 10^7 draws over the five sources
    truth = contract(numel, seed, ids, stream, draw)
    rng = Philox(seed, torch.tensor(ids, device=device), draw=draw, stream=stream)
    drawn = ddpm_ext.randn((3, numel), rng, device=device).cpu()
    assert torch.equal(drawn, ddpm_ext.randn((3, numel), moved(rng, torch.device("cpu"))))
    z = drawn.numpy()
    # the contract's bound. The measured worst is 7.8e-7 here and 1.27e-6 in test_box_muller.py
    assert np.abs(z - truth).max() <= 2e-6
    assert np.abs(truth).max() > 4.5  # there are elements of the tails among them
    z = reference.randn((3, numel), rng, device=device, dtype=torch.float64).cpu().numpy()
    assert np.abs(z - truth).max() <= 1e-14  # measured worst 8.9e-16, one rounding


# The contract's published bits: seed, first id, stream, draw, and elements 0 to 4 of two samples.
BITS = {
    (0, 0, 0, 0): (
        "0x1.fb7660p-1 -0x1.d96d5ap-1 -0x1.3c3746p-1 -0x1.eda370p-2 -0x1.3aa6b8p-3",
        "0x1.114d98p+0 -0x1.b38d6ap-2 -0x1.2f19bep+1 -0x1.da1b0ap-3 0x1.9eaf92p-2",
    ),
    (0x243F6A8885A308D3, 2**40 + 5, 2, 999): (
        "-0x1.57daf8p-1 0x1.2b898cp-1 -0x1.9a5a56p+0 0x1.b403ecp-1 0x1.ede06ap-2",
        "-0x1.80dd44p-2 -0x1.6faddap+0 -0x1.e5e4fep-6 0x1.1de95ep-1 -0x1.80f9aap-1",
    ),
    (2**64 - 1, 2**56 - 2, 255, 2**32 - 1): (
        "0x1.f4ca9ap-1 -0x1.c7ba6ap+0 0x1.aa3e6ep-1 0x1.c1a03cp-2 0x1.5271acp+0",
        "-0x1.dcc8f6p-3 -0x1.0bbc68p-2 0x1.37f2f8p-2 0x1.a07196p-1 -0x1.6d7a72p-1",
    ),
}


@pytest.mark.parametrize("source", BITS)
def test_published_bits(source, device):
    """No change may alter these values, which belong to the noise contract. They are not a snapshot to be updated."""
    seed, first, stream, draw = source
    published = [[float.fromhex(v) for v in line.split()] for line in BITS[source]]
    np.testing.assert_allclose(published, contract(5, seed, [first, first + 1], stream, draw), rtol=0, atol=2e-6)
    rng = Philox(seed, first, stream=stream, draw=draw)
    assert ddpm_ext.randn((2, 5), rng, device=device).tolist() == published


def test_published_bits_of_a_million(device):
    """Their checksum, for a last bit that is wrong in few of them. It belongs to the contract like the values above."""
    assert zlib.crc32(ddpm_ext.randn((1, 2**20), Philox(0), device=device).cpu().numpy().tobytes()) == 0x6EF7F03D


# ------------------------------------------------------------------------------------------------ arguments


def test_own_draw_and_stream_and_those_of_the_call(device):
    randn = functools.partial(ddpm_ext.randn, (2, 9), device=device)
    plain = randn(Philox(1))
    other = randn(Philox(1), draw=3, stream=4)
    assert not torch.equal(plain, other)
    assert torch.equal(plain, randn(Philox(1, draw=0, stream=0)))
    assert torch.equal(other, randn(Philox(1, draw=3, stream=4)))
    for draw in (8, torch.tensor(8, device=device)):
        assert torch.equal(other, randn(Philox(1, draw=draw, stream=9), draw=3, stream=4))


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_seed_may_be_a_tensor_of_its_64_bits(seed, device):
    bits = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    for randn in (ddpm_ext.randn, reference.randn):
        expected = randn((2, 9), Philox(seed), device=device)
        for tensor in (bits, bits.to(device)):
            assert torch.equal(randn((2, 9), Philox(tensor), device=device), expected)


@pytest.mark.parametrize("draw", [0, 7, 2**31, 2**32 - 1])
def test_draw_may_be_a_tensor(draw, device):
    """On the CPU or on the device, by the compiled operators and by their twins."""
    gd, x = GaussianDiffusion(20), torch.linspace(-1, 1, 24, device=device).reshape(2, 12)
    by_reference = GaussianDiffusion(20, backend="reference")

    def everything(draw, gd):
        rng = Philox(3, 5, draw=draw)
        return [
            ddpm_ext.randn((2, 9), rng, device=device),
            gd.q_sample(x, 3, rng=rng),
            gd.p_sample(lambda x, t: x * 0.5, x, 3, rng=rng),
            gd.train_losses(lambda x, t: x * 0.5, x, 3, rng=rng, offset_noise=0.1, input_perturbation=0.1),
        ]

    for each in (gd, by_reference):
        expected = everything(draw, each)
        for there in {torch.device("cpu"), device}:
            for found, wanted in zip(everything(torch.tensor(draw, device=there), each), expected, strict=True):
                assert torch.equal(found, wanted)


LAYOUTS = {
    "every second": lambda each: each.repeat_interleave(2)[::2],
    "a column": lambda each: torch.stack([each + 1, each, each - 1], 1)[:, 1],
    "one for all": lambda each: each[:1].expand(len(each)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[*LAYOUTS])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_ids_and_timesteps_of_any_strides(backend, layout, device):
    """Each sample has the noise of its own id and the row of its own timestep, as when it is alone."""
    gd = GaussianDiffusion(20, backend=backend)
    x = torch.linspace(-1, 1, 48, device=device).reshape(4, 12)
    ids, t = (layout(torch.tensor(each, device=device)) for each in ([3, 2**40, 1, 8], [19, 0, 7, 7]))
    assert not ids.is_contiguous() and not t.is_contiguous()

    def everything(x, t, rng):
        return [
            gd.ops.randn(x.shape, rng, device=device),
            gd.q_sample(x, t, rng=rng),
            gd.p_sample(lambda x, t: x * 0.5, x, t, rng=rng),
        ]

    found = everything(x, t, Philox(3, ids))
    for i in range(4):
        alone = everything(x[i : i + 1], t[i].item(), Philox(3, ids[i].item()))
        assert all(torch.equal(each[i], one[0]) for each, one in zip(found, alone, strict=True))


def test_randn_with_an_rng_leaves_torchs_generators_alone(device):
    generators = [torch.random.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    before = [generator.get_state() for generator in generators]
    ddpm_ext.randn((2, 64), Philox(0), device=device)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_randn_makes_shape_and_dtype(dtype, device):
    for shape in [(3,), (0, 4), (2, 0, 5), (2, 3, 4, 5, 6)]:
        z = ddpm_ext.randn(shape, Philox(0), device=device, dtype=dtype)
        assert z.shape == shape and z.dtype == dtype and z.device == device and z.is_contiguous()


RANDN, BY_REFERENCE = (functools.partial(randn, (2, 3)) for randn in (ddpm_ext.randn, reference.randn))
TOO_LARGE = Philox(1, draw=torch.tensor(2**32))
COUNTER, KEY = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Philox(-1), ValueError, "seed is -1"),
        (lambda: Philox(2**64), ValueError, "seed is 18446744073709551616"),
        (lambda: Philox(True), TypeError, "seed is True"),
        (lambda: Philox("0"), TypeError, "seed is '0'"),
        (lambda: Philox(torch.tensor([1])), TypeError, r"seed .*\(1,\)"),
        (lambda: Philox(torch.tensor(1, dtype=torch.int32)), TypeError, "seed .*int32"),
        (lambda: Philox(0, -1), ValueError, "sample_ids is -1"),
        (lambda: Philox(0, 2**56), ValueError, "sample_ids is"),
        (lambda: Philox(0, [0, 1]), TypeError, "sample_ids is"),
        (lambda: Philox(0, torch.tensor(3)), TypeError, r"sample_ids .*\(\)"),
        (lambda: Philox(0, torch.zeros(2)), TypeError, "sample_ids .*float32"),
        (lambda: Philox(0, draw=2**32), ValueError, "draw is"),
        (lambda: Philox(0, draw=1.0), TypeError, "draw is 1.0"),
        (lambda: Philox(0, draw=torch.tensor([1])), TypeError, r"draw .*\(1,\)"),
        (lambda: Philox(0, draw=torch.tensor(1.0)), TypeError, "draw .*float32"),
        (lambda: Philox(0, stream=256), ValueError, "stream is 256"),
        (lambda: Philox(0, stream="0"), TypeError, "stream is '0'"),
        (lambda: ddpm_ext.randn(()), ValueError, r"shape is \(\)"),
        (lambda: ddpm_ext.randn((2, -1)), ValueError, "shape is .*-1"),
        (lambda: ddpm_ext.randn((2, 1.5)), TypeError, "shape"),
        (lambda: ddpm_ext.randn(5), TypeError, "int"),
        (lambda: RANDN(dtype=torch.float64), TypeError, "dtype .*expected float32"),
        (lambda: RANDN(dtype="float32"), TypeError, "dtype"),
        (lambda: RANDN(device="meta"), ValueError, "device is on meta, expected cpu or cuda"),
        (lambda: RANDN(0), TypeError, "rng is a int, expected a ddpm_ext.Philox"),
        (lambda: RANDN(torch.Generator()), TypeError, "rng is a Generator"),
        (lambda: RANDN(Philox(0, 2**56 - 1)), ValueError, "sample_ids start at .* batch of 2"),
        (lambda: RANDN(Philox(0, torch.arange(3))), ValueError, "sample_ids has shape .*3.*expected .*2"),
        (lambda: RANDN(Philox(0, torch.tensor([0, -1]))), ValueError, r"sample_ids\[1\] is -1"),
        (lambda: RANDN(Philox(0, torch.tensor([2**56, 0]))), ValueError, r"sample_ids\[0\] is"),
        (lambda: RANDN(Philox(0, draw=torch.tensor(1, device="meta"))), ValueError, "draw is on meta, expected cpu"),
        (lambda: RANDN(draw=-1), ValueError, "draw is -1"),
        (lambda: RANDN(draw=0.5), TypeError, "draw is 0.5"),
        (lambda: RANDN(stream=256), ValueError, "stream is 256"),
        (lambda: RANDN(Philox(1, draw=torch.tensor(-1))), ValueError, "draw is -1, expected 0 <= draw < 2"),
        (lambda: BY_REFERENCE(TOO_LARGE), ValueError, "draw is 4294967296, expected 0 <= draw < 2"),
        (lambda: BY_REFERENCE(Philox(0, torch.arange(3))), ValueError, "sample_ids has shape .*3.*expected .*2"),
        (lambda: GaussianDiffusion(20).q_sample(torch.zeros(2, 3), 1, rng=TOO_LARGE), ValueError, "draw is 4294967296"),
        (lambda: reference.philox4x32(COUNTER.float(), KEY), TypeError, "counter has dtype torch.float32"),
        (lambda: reference.philox4x32(COUNTER[:3], KEY), ValueError, r"counter has shape \(3,\)"),
        (lambda: reference.philox4x32(COUNTER, KEY[:1]), ValueError, r"key has shape \(1,\)"),
        (lambda: reference.philox4x32([0, 0, 0, 0], KEY), TypeError, "counter is a list, expected a tensor"),
        (lambda: reference.philox4x32(COUNTER.expand(5, 4), KEY.expand(3, 2)), ValueError, r"\(3, 2\), .*\(5, 4\)"),
    ],
)
def test_arguments_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()
