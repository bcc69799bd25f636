"""diffusers' betas, and its DDIM scheduler, given the same noise. Its tables are float32, ours are not: see `check`."""

import pytest
import torch

from ddpm_ext import GaussianDiffusion, ops
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 2, 5)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def check(ours, theirs, table, i, kept, below, x, m, z):
    """In float32, alphas_cumprod leaves an error of 2^-24 in 1 - alphas_cumprod[t] / alphas_cumprod[below] and in 1
    - alphas_cumprod[below], which is up to 6e-4 of these."""
    a, b, c0, c1, c2, s = (getattr(table, name)[i].abs() for name in ("a", "b", "c0", "c1", "c2", "s"))
    ours, theirs = ours.cpu(), theirs.cpu()
    x, m, z = x.abs().cpu(), m.abs().cpu(), z.abs().cpu()
    magnitude = c0 * (a * x + b * m) + c1 * x + c2 * m + s * z
    before = kept[below] if below >= 0 else 1.0
    relative = 2.0**-24 * (4 + 1 / (1 - kept[table.timestep[i]] / before) + (1 / (1 - before) if before < 1 else 0))
    # measured 0.82, factor 2.4
    assert ((ours - theirs).abs() <= 2 * relative * magnitude).all()


@pytest.mark.parametrize(
    "ours, theirs, ends",
    [("linear", "linear", ()), ("cosine", "squaredcos_cap_v2", ()), ("scaled_linear", "scaled_linear", (85e-5, 0.012))],
)
def test_betas(ours, theirs, ends):
    scheduler = diffusers.DDPMScheduler(1000, *ends, beta_schedule=theirs)
    # float32 betas
    torch.testing.assert_close(GaussianDiffusion(1000, ours).betas, scheduler.betas.double(), rtol=1e-6, atol=2.0**-24)


@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1000, 50])
def test_ddim_step(prediction, theirs, clip, eta, steps, device):
    """At diffusers' own timesteps. Its "leading" spacing is the one whose listed timesteps are also those it steps
    to."""
    scheduler = diffusers.DDIMScheduler(**OPTIONS, prediction_type=theirs, clip_sample=clip, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    gd = GaussianDiffusion(1000, scheduler.betas, prediction=prediction)
    timesteps = scheduler.timesteps.tolist()
    table = ddim(make_grid(gd.alphas_cumprod, scheduler.timesteps), prediction=prediction, eta=eta)
    packed = table.packed(device)
    for i in (0, 1, steps // 2, steps - 3, steps - 2, steps - 1):
        x, m, z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(i)).to(device)
        expected = scheduler.step(m, timesteps[i], x, eta=eta, variance_noise=z).prev_sample
        ours = ops.reverse_step(x, m, packed, i, clip=(-1.0, 1.0) if clip else None, noise=z)
        below = timesteps[i + 1] if i + 1 < steps else -1
        check(ours, expected, table, i, gd.alphas_cumprod, below, x, m, z)
