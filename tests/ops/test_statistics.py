"""The statistics of the noise. Its bits are those of the contract's formula (test_noise.py), on every device, so that a
few samples on the CPU are enough."""

from __future__ import annotations

import numpy as np
import pytest

import ddpm_ext
from ddpm_ext import Philox

scipy_stats = pytest.importorskip("scipy.stats")
LENGTH = 1_000_000


def test_distribution():
    """4 standard errors of each moment of a normal sample: one seed in 4,000 would fail."""
    normals = ddpm_ext.randn((10, 400_000), Philox(20)).double().numpy()
    z, n = normals.ravel(), normals.size
    moments = (z.mean(), 1), (z.var() - 1, 2), (scipy_stats.skew(z), 6), (scipy_stats.kurtosis(z), 24)
    assert all(abs(error) < 4 * (of_one / n) ** 0.5 for error, of_one in moments)
    assert scipy_stats.kstest(z, "norm").pvalue > 1e-3
    for lane in range(4):  # the place of an element in its block
        assert scipy_stats.kstest(normals[:, lane::4].ravel(), "norm").pvalue > 1e-3
    for bound in (2, 3, 4, 4.5):
        expected = z.size * 2 * scipy_stats.norm.sf(bound)
        assert abs((np.abs(z) > bound).sum() - expected) < 4 * expected**0.5


def line(shift: int = 0, *, sample: int = 0, seed: int = 5, **source: int) -> np.ndarray:
    """The elements of one sample, from element `shift` on."""
    rng = Philox(seed, sample, **source)
    return ddpm_ext.randn((1, LENGTH + 8), rng).double().numpy()[0, shift : shift + LENGTH]


def test_no_correlation():
    """Between elements a few places apart, samples, draws, streams and seeds."""
    a = line()
    others = [*((lag, {}) for lag in (1, 2, 3, 4, 5, 8)), (0, {"sample": 1}), (0, {"sample": 2**32})]
    others += [(0, {"draw": 1}), (0, {"draw": 2**31}), (0, {"stream": 1}), (0, {"seed": 6}), (0, {"seed": 5 + 2**32})]
    for shift, source in others:
        b = line(shift, **source)
        # also of their squares: a fault in Box-Muller's radius would make those correlate
        for x, y in ((a, b), (a**2, b**2)):
            assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 * LENGTH**-0.5, (shift, source)
