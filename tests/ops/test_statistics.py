"""The statistics of the noise. Its bits are the same on every device (test_noise.py), so that the CPU is enough."""

from __future__ import annotations

import numpy as np
import pytest

import ddpm_ext
from ddpm_ext import Philox

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return ddpm_ext.randn((10, 400_000), Philox(20)).double().numpy()


def test_moments(normals):
    z, n = normals.ravel(), normals.size
    # 4 standard errors of each moment of a normal sample: one seed in 4,000 would fail
    assert abs(z.mean()) < 4 * n**-0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(scipy_stats.skew(z)) < 4 * (6 / n) ** 0.5
    assert abs(scipy_stats.kurtosis(z)) < 4 * (24 / n) ** 0.5


def test_distribution(normals):
    assert scipy_stats.kstest(normals.ravel(), "norm").pvalue > 1e-3
    for lane in range(4):  # the place of an element in its block
        assert scipy_stats.kstest(normals[:, lane::4].ravel(), "norm").pvalue > 1e-3


def test_tails(normals):
    z = np.abs(normals.ravel())
    for bound in (2, 3, 4, 4.5):
        expected = z.size * 2 * scipy_stats.norm.sf(bound)
        assert abs((z > bound).sum() - expected) < 4 * expected**0.5


LENGTH = 1_000_000


def line(shift: int = 0, *, step: int = 1, sample: int = 0, seed: int = 5, **source: int) -> np.ndarray:
    """The elements of one sample, from element `shift` on."""
    rng = Philox(seed, sample, **source)
    return ddpm_ext.randn((1, LENGTH + 8), rng).double().numpy()[0, shift : shift + LENGTH : step]


def small(first: int) -> np.ndarray:
    """Many samples of eight elements each."""
    return ddpm_ext.randn((LENGTH // 8, 8), Philox(5, first)).double().numpy().ravel()


# Pairs of arrays whose elements at the same place must be independent.
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
    # also of their squares: a fault in Box-Muller's radius would make those correlate
    for x, y in ((a, b), (a**2, b**2)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 * len(a) ** -0.5
