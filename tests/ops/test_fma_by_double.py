"""fma on machines without the instruction, beside the C library's, which C demands to be rounded once."""

from __future__ import annotations

import ctypes
import math
import platform

import numpy as np
import pytest
from support.compilers import compiled

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the vectors are SSE2's, of x86-64")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compiled("g++", "fma_trial.cpp", tmp_path_factory.mktemp("fma"), ("-O2", "-ffp-contract=off"))


@pytest.fixture(scope="module", params=["vectors", "numbers"])
def fma(library, request):
    return lambda a, b, c: call(getattr(library, f"fma_of_{request.param}"), a, b, c)


def call(function, a, b, c) -> np.ndarray:
    """Of float32 arrays; the last four are padded."""
    arrays = [np.concatenate([np.asarray(x, np.float32), np.zeros(-len(x) % 4, np.float32)]) for x in (a, b, c)]
    out = np.empty_like(arrays[0])
    function(ctypes.c_int64(len(out)), *(ctypes.c_void_p(x.ctypes.data) for x in (*arrays, out)))
    return out[: len(a)]


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(got), ~number)
    assert np.array_equal(got.view(np.uint32)[number], expected.view(np.uint32)[number])


def rounded_twice(a, b, c) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def halfway_cases(rng: np.random.Generator, n: int, exponents: tuple[int, int]):
    """Products just beside half of c's last place: (1 + i 2^-23)(1 - i 2^-23) 2^k = (1 - i^2 2^-46) 2^k."""
    exponent = rng.integers(*exponents, n)  # of c
    k = np.maximum(exponent, -126) - 24
    i = rng.integers(0, 9, n) * 2.0**-23
    sign = rng.choice([-1.0, 1.0], (2, n))
    a, b = sign[0] * (1 + i) * 2.0 ** (k // 2), (1 - i) * 2.0 ** (k - k // 2)
    least = np.float64(2.0) ** (np.maximum(exponent, -126) - 23)
    c = sign[1] * np.floor(np.float64(2.0) ** exponent * rng.uniform(1, 2, n) / least) * least
    return tuple(x.astype(np.float32) for x in (a, b, c))


SPECIAL = [0.0, 1.0, 1 + 2**-23, 1 - 2**-24, 1.5, 3.0, 2**12 + 1, 2**24 - 1, 2**-149, 3 * 2**-149, 2**-126 - 2**-149]
SPECIAL += [2**-126, 2**-75, 2**-74, 2**-24, 2**-25, 2**103, 2**127, (2 - 2**-23) * 2**127, math.inf, math.nan]


@pytest.mark.parametrize("cases", ["special", "any", "near", "halfway", "subnormal", "below_normal", "overflow"])
def test_the_bits_are_the_c_librarys(library, fma, cases):
    rng = np.random.default_rng(0)
    if cases == "special":
        signed = np.array([*SPECIAL, *(-x for x in SPECIAL)], np.float32)
        a, b, c = (x.ravel() for x in np.meshgrid(signed, signed, signed))
    elif cases == "any":
        a, b, c = rng.integers(0, 2**32, (3, 400_000), dtype=np.uint32).view(np.float32)
    elif cases == "near":  # numbers of few bits, whose sums are often exact or halfway
        a, b = rng.integers(-(2**12), 2**12, (2, 400_000)).astype(np.float32)
        c = np.float32(2.0) ** rng.integers(-30, 30, 400_000) * rng.integers(-(2**24), 2**24, 400_000)
    else:
        exponents = {
            "halfway": (-100, 127),
            "subnormal": (-149, -120),
            "below_normal": (-127, -126),
            "overflow": (126, 128),
        }
        a, b, c = halfway_cases(rng, 200_000, exponents[cases])
        if cases == "below_normal":  # the largest subnormal number: half a place above it, rounding twice gives 2^-126
            c = np.copysign(np.float32(2**-126 - 2**-149), c)
        wrong = rounded_twice(a, b, c).view(np.uint32) != call(library.fma_of_libm, a, b, c).view(np.uint32)
        assert wrong.mean() > 0.1  # hard cases they are
    assert_same_bits(fma(a, b, c), call(library.fma_of_libm, a, b, c))
