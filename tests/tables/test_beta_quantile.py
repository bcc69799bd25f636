"""Quantiles of the beta distribution."""

import pytest
import torch
from scipy import stats
from support.choices import for_many

from ddpm_ext.tables.beta_quantile import beta_quantile


@for_many(100)
def test_quantiles_are_scipys(choose):
    alpha, beta = (0.1 * choose.integer(1, 100) for _ in range(2))
    p = torch.linspace(0, 1, choose.integer(2, 40), dtype=torch.float64)
    expected = torch.from_numpy(stats.beta.ppf(p.numpy(), alpha, beta))
    torch.testing.assert_close(beta_quantile(p, alpha, beta), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("alpha, beta", [(0, 1), (0.6, 11), (0.6, -1)])
def test_bad_parameters(alpha, beta):
    with pytest.raises(ValueError, match=r"(alpha|beta) is \S+, expected 0 < (alpha|beta) <= 10"):
        beta_quantile(torch.tensor([0.5]), alpha, beta)
