"""diffusers' loop with rescaled guidance and dynamic thresholding."""

import importlib

import pytest
import torch

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Philox, randn

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 2, 5, 7)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def rescale_noise_cfg(*args, **options):
    # older versions have it beside a pipeline alone, which needs more than diffusers
    places = ("guiders.guider_utils", "pipelines.stable_diffusion.pipeline_stable_diffusion")
    for place in places:
        try:
            return importlib.import_module(f"diffusers.{place}").rescale_noise_cfg(*args, **options)
        except ImportError:
            continue
    pytest.skip("diffusers has no rescale_noise_cfg that can be imported")


@pytest.mark.parametrize(
    "phi, quantile, maximum", [(0.0, 0.995, 1.0), (0.3, 0.9, 1.5), (0.7, 0.9, 2.0), (1.0, 0.5, 100.0)]
)
def test_a_loop_with_both(device, phi, quantile, maximum):
    """With a doubled batch, as pipelines have it, by DDIM over a few timesteps, without noise."""
    threshold = {"thresholding": True, "dynamic_thresholding_ratio": quantile, "sample_max_value": maximum}
    scheduler = diffusers.DDIMScheduler(**OPTIONS, **threshold, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    gd = GaussianDiffusion(1000, scheduler.betas)

    def model(x, t):
        shift = torch.tensor([0.4, 1.0], device=x.device).repeat_interleave(len(x) // 2)
        return 0.4 * x * shift.reshape(-1, 1, 1, 1) + 0.1

    x = randn(SHAPE, Philox(5), stream=1, device=device)
    for t in scheduler.timesteps:
        u, m = model(torch.cat([x, x]), t).chunk(2)
        guided = rescale_noise_cfg(u + 3.0 * (m - u), m, guidance_rescale=phi)
        x = scheduler.step(guided, t, x).prev_sample
    ours = gd.p_sample_loop(
        model,
        SHAPE,
        sampler="ddim",
        timesteps=scheduler.timesteps,
        guidance=Guidance(3.0, rescale=phi),
        clip_denoised=DynamicThreshold(quantile, maximum),
        **{"rng": Philox(5), "device": device, "record": "last", "progress": False},
    )
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)  # measured 4e-7; their tables are float32
