"""Every option of step_log_prob changes the log-probability."""

import pytest
import torch
from support.every_option import Another, check_has_value, entries, equal, keywords_of

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.losses.step_log_prob import StepLogProb

X, M, PREV = 0.5 * randn((3, 2, 3, 4, 4), Philox(5))
VALUES = {
    "sampler": Another({"sampler": "ddpm", "eta": None}),
    "steps": Another({"steps": 5}),
    "spacing": Another({"spacing": "linspace"}),
    "timesteps": Another({"timesteps": [15, 9, 2], "steps": None}),
    "eta": Another({"eta": 0.5}),
    "clip_denoised": [Another({"clip_denoised": clip}) for clip in (False, (-0.25, 0.25))],
    "reduction": Another({"reduction": "sum"}),
}
BASE = {"sampler": "ddim", "steps": 4, "eta": 0.9, "clip_denoised": True}


def of(backend="fused", dtype=torch.float32, **options):
    log_prob = GaussianDiffusion(20, prediction="v", backend=backend).step_log_prob(**BASE | options)
    return log_prob(M.to(dtype), X.to(dtype), PREV.to(dtype), 0)


@pytest.mark.parametrize(("name", "entry"), entries(VALUES, keywords_of(GaussianDiffusion.step_log_prob)))
def test_another_value_is_seen(name, entry):
    check_has_value(name, entry)
    assert not equal(of(**entry.given), of())


def test_the_backend_takes_its_dtypes():
    """The reference alone computes in float64; in float32 the two differ by rounding."""
    torch.testing.assert_close(of("reference"), of())
    torch.testing.assert_close(of("reference", torch.float64), of().double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="float64"):
        of(dtype=torch.float64)
    table = GaussianDiffusion(20).step_log_prob().table
    assert {*keywords_of(StepLogProb)} == {"clip_denoised", "reduction", "backend"}
    assert StepLogProb(table, backend="reference")(*(v.double() for v in (M, X, PREV)), 0).dtype is torch.float64
